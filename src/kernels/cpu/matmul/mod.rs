//! Products with a frozen weight that was packed once, and with plain matrices.
//!
//! Every output number is summed over the inner dimension in order, by chains that begin at fixed places, so it does not depend on
//! how many rows the call has, nor on how the work was cut up. A weight in bf16 or quantized is multiplied by `vdpbf16ps` where the
//! processor has it, in one chain (in four where its columns are 16 or fewer); that rounds the activations, and what codes stand for,
//! to bf16. Elsewhere a weight in bf16 is widened and multiplied in f32, a quantized one too with AVX-512; without it codes are
//! multiplied with activations of 16 bits
//! (`sixteen.rs`). So processors differ by such roundings.

mod ahead;
mod backward;
mod coded;
mod low;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod plain;
mod sixteen;
mod stored;
#[cfg(test)]
mod tests;
mod tile;
mod together;
mod turn;
#[cfg(target_arch = "x86_64")]
mod unpack;

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::level::{Level, has_bf16_products, level};
use super::places::{Out, filled};
use crate::cores::each;
use ahead::{Ahead, NOTHING};
use coded::CodePanels;
#[cfg(target_arch = "x86_64")]
use coded::CodedPanel;
pub use coded::Codes;
pub use low::LowRank;
#[cfg(target_arch = "x86_64")]
pub(super) use pairs::{PairTile, Pairs, Panel, interleave, round_row};
pub use plain::{Left, multiply};
use sixteen::{SixteenTile, Sixteens};
use stored::Stored;
use tile::{CHAIN, ROWS};
pub(super) use tile::{PANEL, Plain, Sums, Tile};
pub use together::{Adapted, forward_together};
#[cfg(target_arch = "x86_64")]
pub(super) use turn::{corner, side};

/// Numbers of a block of activations, so that it stays in cache while panels pass by.
const BLOCK: usize = 1 << 17;
/// Columns of a quantized weight that are unpacked at once: 16 KiB of bf16, or 32 of f32. In f32 each is a chain.
const UNPACKED: usize = CHAIN;
/// Most rows for which a quantized panel is unpacked on the way into a product of bf16 or of AVX-512, and not first into memory.
#[cfg(target_arch = "x86_64")]
const FEW_ROWS: usize = 8;
/// Largest weight that is unpacked whole (if quantized) or turned whole for a call of many rows: 64 MiB of bf16.
const MOST_WHOLE: usize = 1 << 25;
/// Tasks a thread gets: enough to even out, few enough to cost nothing when one row is read.
const TASKS: usize = 4;
/// Most multiplications of a task: a core that is called off ends its task first.
const MOST_PRODUCTS: usize = 1 << 26;

/// How the weight's numbers are stored.
#[derive(Clone, Debug)]
pub enum Width {
    /// 4 bytes.
    F32(Vec<f32>),
    /// 2 bytes, exponent of f32.
    Bf16(Vec<bf16>),
    /// 2 bytes, IEEE half.
    F16(Vec<f16>),
    /// Quantized.
    Codes(Codes),
}

/// A weight's panels.
#[derive(Clone, Debug)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Codes(CodePanels),
}

/// A weight W: (N, K) as panels `(⌈N/32⌉, K, 32)`, in bf16 `(⌈N/32⌉, ⌈K/2⌉, 32, 2)`, zero-padded, 16 wide where N ≤ 16; quantized
/// ones as `coded.rs` says.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    panels: Panels,
    /// (N).
    bias: Option<Vec<f32>>,
}

/// Activations on their way into products, in every form that one of the weights takes.
struct Input<'a> {
    plain: Cow<'a, [f32]>,
    mode: Mode,
    #[cfg(target_arch = "x86_64")]
    rounded: Option<Pairs>,
    sixteens: Option<Sixteens>,
}

impl<'a> Input<'a> {
    /// x: (M, K), K as wide as all of the weights.
    fn new<'w>(
        x: impl Into<Cow<'a, [f32]>>,
        k: usize,
        mode: Mode,
        weights: impl Iterator<Item = &'w Packed> + Clone,
    ) -> Self {
        let plain = x.into();
        let codes = weights.clone().any(|weight| matches!(weight.panels, Panels::Codes(_)));
        Input {
            mode,
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `pairs` says that the processor has the instructions.
            rounded: (mode.pairs && weights.clone().any(Packed::is_bf16)).then(|| unsafe { Pairs::new(&plain, k) }),
            sixteens: (mode.sixteens && codes).then(|| Sixteens::new(mode.level, &plain, k)),
            plain,
        }
    }
}

/// How a call multiplies.
#[derive(Clone, Copy, Debug)]
struct Mode {
    level: Level,
    /// bf16 and quantized weights by `vdpbf16ps`.
    pairs: bool,
    /// Quantized weights by whole numbers.
    sixteens: bool,
}

impl Mode {
    fn best() -> Self {
        let (level, pairs) = (level(), has_bf16_products());
        Mode { level, pairs, sixteens: !pairs && !level.is_avx512() }
    }
}

/// How a panel's product is stored.
#[derive(Clone, Copy)]
struct Onto<'a> {
    /// 1..=32.
    columns: usize,
    /// Whether the sums start from what is there.
    add: bool,
    /// What is sent for meanwhile.
    ahead: &'a Ahead,
}

impl Packed {
    /// Packs W: (N, K), row-major.
    pub fn new(weight: &Width, n: usize, k: usize) -> Self {
        let panels = match weight {
            Width::F32(weight) => Panels::F32(pack(weight, n, k)),
            Width::Bf16(weight) => Panels::Bf16(pack(weight, n, k)),
            Width::F16(weight) => Panels::F16(pack(weight, n, k)),
            Width::Codes(codes) => Panels::Codes(CodePanels::new(codes, n, k)),
        };
        Packed { n, k, panels, bias: None }
    }

    /// The same with a bias (N) that every product adds.
    pub fn with_bias(self, bias: Vec<f32>) -> Self {
        assert_eq!(bias.len(), self.n, "a bias that does not fit");
        Packed { bias: Some(bias), ..self }
    }

    /// Rows of W: output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of W: input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let panels = match &self.panels {
            Panels::F32(panels) => panels.len() * 4,
            Panels::Bf16(panels) => panels.len() * 2,
            Panels::F16(panels) => panels.len() * 2,
            Panels::Codes(panels) => panels.bytes(),
        };
        panels + self.bias.as_ref().map_or(0, |bias| bias.len() * 4)
    }

    /// Whether activations are rounded to bf16 on their way into a product where the processor multiplies bf16.
    pub fn is_bf16(&self) -> bool {
        matches!(self.panels, Panels::Bf16(_) | Panels::Codes(_))
    }

    /// `x·Wᵀ + bias`. x: (M, K) → (M, N), both row-major.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        self.forward_adapted(x, &[])
    }

    /// `x·Wᵀ + bias` with `x·Aᵀ·Bᵀ` added to some of its rows, each sum going on where the one before ended. x: (M, K) → (M, N); no row
    /// is in two parts.
    pub fn forward_adapted(&self, x: &[f32], parts: &[LowRank<'_>]) -> Vec<f32> {
        forward_together(x, &[Adapted { weight: self, parts }], &[]).remove(0)
    }

    /// Row `n` of W into `out`: (K).
    pub fn row(&self, n: usize, out: &mut [f32]) {
        match &self.panels {
            Panels::F32(panels) => self.row_of(panels, n, out),
            Panels::Bf16(panels) => self.row_of(panels, n, out),
            Panels::F16(panels) => self.row_of(panels, n, out),
            Panels::Codes(panels) => panels.row(n, has_bf16_products(), out),
        }
    }

    fn row_of<W: Stored>(&self, panels: &[W], n: usize, out: &mut [f32]) {
        let (panel, width) = (self.panel_of(panels, n / PANEL), self.width());
        for (k, value) in out.iter_mut().enumerate() {
            *value = panel[(k / W::STEP * width + n % PANEL) * W::STEP + k % W::STEP].widen();
        }
    }

    fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Columns of a panel.
    fn width(&self) -> usize {
        width(self.n)
    }

    fn panel_of<'a, W: Stored>(&self, panels: &'a [W], panel: usize) -> &'a [W] {
        let len = panel_len::<W>(self.width(), self.k);
        &panels[panel * len..][..len]
    }

    /// All columns of some rows of the input, on this thread: (rows, N).
    fn some_rows(&self, input: &Input<'_>, rows: Range<usize>) -> Vec<f32> {
        let multiply = |y: Out| {
            for panel in 0..self.panels() {
                let how = Onto { columns: PANEL.min(self.n - panel * PANEL), add: false, ahead: &NOTHING };
                // SAFETY: rows and columns are inside y.
                unsafe { self.panel(input, panel, rows.clone(), y.at(panel * PANEL), &how) };
            }
        };
        // SAFETY: the panels are all columns.
        unsafe { filled(rows.len() * self.n, multiply) }
    }

    /// One panel's columns of some rows of the input.
    /// # Safety
    /// `to` has room for them, rows N apart, and nobody else uses it.
    unsafe fn panel(&self, input: &Input<'_>, panel: usize, rows: Range<usize>, to: *mut f32, how: &Onto<'_>) {
        let (len, level, Onto { columns, add, ahead }) = (rows.len(), input.mode.level, *how);
        let sends = matches!(self.panels, Panels::Codes(_)) && input.sixteens.is_none() && level.is_avx512();
        if !(sends && len <= FEW_ROWS) {
            ahead.send();
        }
        // SAFETY: the caller's promise; the tiles say what is there.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if let Some(x) = &input.rounded
                && self.is_bf16()
            {
                return self.panel_of_pairs(x, panel, rows, to, how);
            }
            let x = input.plain[rows.start * self.k..].as_ptr();
            match &self.panels {
                Panels::F32(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::Bf16(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::F16(panels) => self.widened(panels, panel, x, columns, add).run(level, len, to, self.n),
                Panels::Codes(panels) => {
                    if let Some(x) = &input.sixteens {
                        let tile = SixteenTile { x, row: rows.start, panels, panel, columns, add };
                        return tile.run(level, len, to, self.n);
                    }
                    let sums = Sums::new(add);
                    let tile = Tile { x, stride: self.k, turned: false, weights: (), k: self.k, columns, sums };
                    #[cfg(target_arch = "x86_64")]
                    if level.is_avx512() && len <= FEW_ROWS {
                        return tile.of(CodedPanel(panels, panel, 0, ahead)).avx512_rows::<false>(len, to, self.n);
                    }
                    unpacked(tile, panels, panel, level, len, to, self.n);
                }
            }
        }
    }

    /// A panel is read soon.
    fn push_to(&self, ahead: &mut Ahead, panel: usize) {
        match &self.panels {
            Panels::F32(panels) => ahead.push(self.panel_of(panels, panel)),
            Panels::Bf16(panels) => ahead.push(self.panel_of(panels, panel)),
            Panels::F16(panels) => ahead.push(self.panel_of(panels, panel)),
            Panels::Codes(_) => {}
        }
    }

    /// A quantized weight in bf16, for the time of one call in pairs, where its panels would be unpacked for several blocks of rows.
    fn whole(&self, mode: Mode, of_rows: usize) -> Option<Packed> {
        #[cfg(target_arch = "x86_64")]
        if let Panels::Codes(panels) = &self.panels
            && mode.pairs
            && of_rows > 1
            && self.n * self.k <= MOST_WHOLE
            && self.width() == PANEL
        {
            let (n, k) = (self.n, self.k);
            let len = panel_len::<bf16>(PANEL, k);
            let count = n.div_ceil(PANEL);
            let unpack = |to: Out<bf16>| {
                // SAFETY: `pairs` says that the processor has the instructions, and every panel has its own room.
                each(0..count, |panel| unsafe { panels.unpack(panel, blocks(&(0..k)), to.at(panel * len)) });
            };
            // SAFETY: the panels are all numbers.
            let numbers = unsafe { filled(count * len, unpack) };
            return Some(Packed { n, k, panels: Panels::Bf16(numbers), bias: None });
        }
        let _ = (mode, of_rows);
        None
    }

    /// # Safety
    /// As [`Self::panel`]; the processor has the instructions.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn panel_of_pairs(&self, x: &Pairs, panel: usize, rows: Range<usize>, to: *mut f32, how: &Onto<'_>) {
        let (stride, pairs) = (x.stride(), x.stride());
        let (x, turned, Onto { columns, add, ahead }) = (x.from(rows.start, 0), false, *how);
        let tile = PairTile { x, stride, turned, weights: (), pairs, columns, add };
        // SAFETY: the caller's promise; the fields say what is there.
        unsafe {
            match &self.panels {
                Panels::Codes(panels) if rows.len() <= FEW_ROWS => {
                    tile.of(CodedPanel(panels, panel, 0, ahead)).run(rows.len(), to, self.n);
                }
                Panels::Codes(panels) => unpacked_in_pairs(tile, panels, panel, rows.len(), to, self.n),
                Panels::Bf16(panels) => {
                    let weights = self.panel_of(panels, panel).as_ptr();
                    match self.width() {
                        PANEL => tile.of(Panel::<2>(weights)).run(rows.len(), to, self.n),
                        _ => tile.of(Panel::<1>(weights)).narrow(rows.len(), to, self.n),
                    }
                }
                _ => {}
            }
        }
    }

    /// One panel against rows from `x` on.
    fn widened<W: Stored>(
        &self,
        panels: &[W],
        panel: usize,
        x: *const f32,
        columns: usize,
        add: bool,
    ) -> Tile<Plain<W>> {
        let weights = Plain(self.panel_of(panels, panel).as_ptr(), self.width() * W::STEP);
        Tile { x, stride: self.k, turned: false, weights, k: self.k, columns, sums: Sums::new(add) }
    }
}

/// A quantized panel, unpacked first. Not part of [`Packed::panel`], whose every call would touch the pages of its room.
/// # Safety
/// As [`Tile::run`].
#[inline(never)]
unsafe fn unpacked(
    tile: Tile<()>,
    panels: &CodePanels,
    panel: usize,
    level: Level,
    rows: usize,
    to: *mut f32,
    n: usize,
) {
    let mut numbers = [0f32; UNPACKED * PANEL];
    for k in pieces(tile.k, UNPACKED) {
        panels.widen(level, panel, blocks(&k), &mut numbers);
        let tile = Tile { x: tile.x.wrapping_add(k.start), k: k.len(), sums: tile.sums.from(k.start), ..tile };
        // SAFETY: the caller's promise.
        unsafe { tile.of(Plain(numbers.as_ptr(), PANEL)).run(level, rows, to, n) };
    }
}

/// As [`unpacked`], in bf16.
/// # Safety
/// As [`PairTile::run`].
#[cfg(target_arch = "x86_64")]
#[inline(never)]
unsafe fn unpacked_in_pairs(
    tile: PairTile<()>,
    panels: &CodePanels,
    panel: usize,
    rows: usize,
    to: *mut f32,
    n: usize,
) {
    let mut numbers = [bf16::ZERO; UNPACKED * PANEL];
    for k in pieces(2 * tile.pairs, UNPACKED) {
        // SAFETY: the caller's promise.
        unsafe {
            panels.unpack(panel, blocks(&k), numbers.as_mut_ptr());
            let (x, pairs, add) = (tile.x.add(k.start / 2), k.len() / 2, tile.add || k.start > 0);
            PairTile { x, pairs, add, ..tile }.of(Panel::<2>(numbers.as_ptr())).run(rows, to, n);
        }
    }
}

/// Columns `0..k` some at a time, in order.
fn pieces(k: usize, some: usize) -> impl Iterator<Item = Range<usize>> {
    (0..k).step_by(some).map(move |start| start..k.min(start + some))
}

/// The blocks of quantized columns.
fn blocks(k: &Range<usize>) -> Range<usize> {
    k.start / coded::BLOCK..k.end / coded::BLOCK
}

/// How many blocks of how many rows: even, whole microkernels, about [`BLOCK`] numbers each.
fn row_blocks(m: usize, width: usize) -> (usize, usize) {
    let blocks = m.div_ceil((BLOCK / width).max(8 * ROWS)).max(1);
    let block = m.div_ceil(blocks).next_multiple_of(ROWS).max(ROWS);
    (m.div_ceil(block), block)
}

/// Columns of a panel of a weight with N rows.
fn width(n: usize) -> usize {
    if n <= PANEL / 2 { PANEL / 2 } else { PANEL }
}

fn panel_len<W: Stored>(width: usize, k: usize) -> usize {
    k.next_multiple_of(W::STEP) * width
}

fn pack<W: Stored>(weight: &[W], n: usize, k: usize) -> Vec<W> {
    let width = width(n);
    let len = panel_len::<W>(width, k);
    let mut panels = vec![W::default(); n.div_ceil(PANEL) * len];
    panels.par_chunks_mut(len).enumerate().for_each(|(panel, out)| {
        for column in 0..PANEL.min(n - panel * PANEL) {
            let row = &weight[(panel * PANEL + column) * k..][..k];
            for (at, value) in row.iter().enumerate() {
                out[(at / W::STEP * width + column) * W::STEP + at % W::STEP] = *value;
            }
        }
    });
    panels
}
