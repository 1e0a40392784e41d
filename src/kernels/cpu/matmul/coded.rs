//! Weights that stay quantized: codes of 4 or 8 bits with a scale and an offset for every 32 (or 16) numbers of a row.
//!
//! A number is `scale·code + offset` in f32; where the processor multiplies bf16 it is rounded to bf16 as it is read. A product has the
//! bits of the same product over those numbers, whatever the rows: codes cost a fraction of the memory traffic and change nothing else.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::ahead::{Ahead, NOTHING, send_for};
use super::tile::PANEL;
use crate::kernels::cpu::level::Level;
use crate::kernels::cpu::rowwise::at_every_level;

/// Numbers of a row that are read at a time.
pub(super) const BLOCK: usize = 32;
/// Bytes of a line.
pub(super) const LINE: usize = 64;
/// How far ahead the blocks of a panel are sent for.
#[cfg(target_arch = "x86_64")]
const BLOCKS_AHEAD: usize = 3;

/// A quantized W: (N, K), row-major; K is a multiple of 32.
#[derive(Clone, Debug)]
pub struct Codes {
    /// Whether codes are 0..16 (4 bits), not -128..128 (8 bits).
    pub four_bits: bool,
    /// Numbers of a row that share a scale: 32, or 16.
    pub group: usize,
    /// (N, K).
    pub codes: Vec<i8>,
    /// (N, K / group).
    pub scales: Vec<f16>,
    /// (N, K / group), where the format has offsets.
    pub offsets: Option<Vec<f16>>,
}

/// One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Line(pub(super) [u8; LINE]);

/// Panels of 32 rows of W, cut into blocks of 32 columns. A block is for each group a line of 32 scales (and one of offsets), then
/// codes: lines that take turns between the first and the second 16 rows. A line holds its codes in sets of 16, code `2i + c` of a
/// set from column `c` of two and row i of eight: rows 0..8 and 8..16 in turn, and two columns after the other. Eight sets of 4 bits
/// lie in 16 words, the first in the low bits of each; four sets of 8 bits one behind the other.
#[derive(Clone, Debug)]
pub(super) struct CodePanels {
    pub(super) bits: usize,
    /// Groups in a block.
    pub(super) groups: usize,
    pub(super) has_offsets: bool,
    /// Blocks in a panel.
    blocks: usize,
    lines: Vec<Line>,
}

impl CodePanels {
    pub(super) fn new(codes: &Codes, n: usize, k: usize) -> Self {
        let (bits, groups) = (if codes.four_bits { 4 } else { 8 }, BLOCK / codes.group);
        let mut panels =
            CodePanels { bits, groups, has_offsets: codes.offsets.is_some(), blocks: k / BLOCK, lines: Vec::new() };
        let (length, heads) = (panels.block_lines(), panels.heads());
        let mut lines = vec![Line([0; LINE]); n.div_ceil(PANEL) * panels.blocks * length];
        lines.par_chunks_mut(length).enumerate().for_each(|(at, lines)| {
            let (panel, block) = (at / panels.blocks, at % panels.blocks);
            for column in 0..PANEL.min(n - panel * PANEL) {
                let from = (panel * PANEL + column) * k + block * BLOCK;
                for group in 0..groups {
                    let of_group = from / codes.group + group;
                    let mut put = |line: usize, value: f16| {
                        lines[line].0[2 * column..][..2].copy_from_slice(&value.to_le_bytes());
                    };
                    put(group * heads / groups, codes.scales[of_group]);
                    if let Some(offsets) = &codes.offsets {
                        put(group * heads / groups + 1, offsets[of_group]);
                    }
                }
                for row in 0..BLOCK {
                    let (line, byte, shift) = panels.place(row, column);
                    lines[line].0[byte] |= (codes.codes[from + row] as u8) << shift;
                }
            }
        });
        panels.lines = lines;
        panels
    }

    pub(super) fn bytes(&self) -> usize {
        self.lines.len() * LINE
    }

    /// Lines of scales and offsets in a block.
    pub(super) fn heads(&self) -> usize {
        self.groups * (1 + usize::from(self.has_offsets))
    }

    fn block_lines(&self) -> usize {
        self.heads() + 2 * self.bits
    }

    /// Line, byte and bit of a code in its block.
    fn place(&self, row: usize, column: usize) -> (usize, usize, usize) {
        let rows = BLOCK / self.bits;
        let line = self.heads() + row / rows * 2 + column / 16;
        let word = column % 8 * 2 + row % 2;
        let at = row % rows / 2 * 2 + column % 16 / 8;
        if self.bits == 4 { (line, word * 4 + at / 2, at % 2 * 4) } else { (line, at * 16 + word, 0) }
    }

    pub(super) fn block(&self, panel: usize, block: usize) -> &[Line] {
        &self.lines[(panel * self.blocks + block) * self.block_lines()..][..self.block_lines()]
    }

    /// The scales and offsets of a block's group, for any processor.
    #[inline(always)]
    pub(super) fn heads_of(&self, panel: usize, block: usize, group: usize) -> ([f32; PANEL], [f32; PANEL]) {
        let lines = &self.block(panel, block)[group * self.heads() / self.groups..];
        let numbers = |line: &Line| -> [f32; PANEL] {
            std::array::from_fn(|at| f16::from_le_bytes([line.0[2 * at], line.0[2 * at + 1]]).to_f32())
        };
        (numbers(&lines[0]), if self.has_offsets { numbers(&lines[1]) } else { [0.0; PANEL] })
    }

    /// The codes of a block by rows, for any processor.
    #[inline(always)]
    pub(super) fn codes(&self, panel: usize, block: usize) -> [[i16; PANEL]; BLOCK] {
        let mut found = [[0; PANEL]; BLOCK];
        let per_line = BLOCK / self.bits;
        for (line, Line(bytes)) in self.block(panel, block)[self.heads()..].iter().enumerate() {
            let word = |at: usize| u32::from_le_bytes(bytes.as_chunks().0[at]);
            let words: [[u32; 8]; 2] = [0, 1].map(|row| std::array::from_fn(|c| word(2 * c + row)));
            for (at, row) in (0..per_line).flat_map(|at| [(at, 0), (at, 1)]) {
                let codes: [i16; 8] = match self.bits {
                    4 => words[row].map(|word| (word >> (4 * at) & 15) as i16),
                    _ => std::array::from_fn(|c| i16::from(bytes[at * 16 + 2 * c + row] as i8)),
                };
                let column = line % 2 * 16 + at % 2 * 8;
                found[line / 2 * per_line + at / 2 * 2 + row][column..][..8].copy_from_slice(&codes);
            }
        }
        found
    }

    /// Row `n` of W, rounded to bf16 or not.
    pub(super) fn row(&self, n: usize, rounds: bool, out: &mut [f32]) {
        let (panel, column) = (n / PANEL, n % PANEL);
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let lines = self.block(panel, block);
            let head = |line: usize| f16::from_le_bytes([lines[line].0[2 * column], lines[line].0[2 * column + 1]]);
            for (row, value) in out.iter_mut().enumerate() {
                let first = row / (BLOCK / self.groups) * self.heads() / self.groups;
                let offset = if self.has_offsets { head(first + 1).to_f32() } else { 0.0 };
                let (line, byte, shift) = self.place(row, column);
                let code = match self.bits {
                    4 => f32::from(lines[line].0[byte] >> shift & 15),
                    _ => f32::from(lines[line].0[byte] as i8),
                };
                let exact = head(first).to_f32() * code + offset;
                *value = if rounds { bf16::from_f32(exact).to_f32() } else { exact };
            }
        }
    }

    /// Blocks of a panel in f32: (32·blocks, 32).
    pub(super) fn widen(&self, level: Level, panel: usize, blocks: Range<usize>, to: &mut [f32]) {
        for (block, to) in blocks.zip(to.chunks_exact_mut(BLOCK * PANEL)) {
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has the instructions, and `to` has room for 32 rows of 32.
                Level::Avx512 => unsafe { self.widen_by_rows(panel, block, to.as_mut_ptr()) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Level::Avx2 => unsafe { self.widen_by_pairs(panel, block, to.as_mut_ptr()) },
                Level::Portable => widen_plain(self, panel, block, to),
            }
        }
    }
}

at_every_level! {
    /// One block in f32, for any processor.
    fn widen_plain(panels: &CodePanels, panel: usize, block: usize, to: &mut [f32]) {
        let rows = BLOCK / panels.groups;
        for (row, (codes, to)) in panels.codes(panel, block).iter().zip(to.as_chunks_mut::<PANEL>().0).enumerate() {
            let (scales, offsets) = panels.heads_of(panel, block, row / rows);
            for column in 0..PANEL {
                to[column] = f32::from(codes[column]) * scales[column] + offsets[column];
            }
        }
    }
}

/// A panel that is unpacked as it is multiplied, from a block on, and what is sent for meanwhile.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct CodedPanel<'a>(pub(super) &'a CodePanels, pub(super) usize, pub(super) usize, pub(super) &'a Ahead);

#[cfg(target_arch = "x86_64")]
impl super::pairs::Weights for CodedPanel<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn each(self, pairs: usize, mut emit: impl FnMut(usize, [__m512bh; 2])) {
        let blocks = pairs / (BLOCK / 2);
        let mut send_for_some = self.3.in_parts(blocks);
        for block in 0..blocks {
            send_for_some();
            // At every page the processor would begin anew to foresee them.
            let lines = self.0.block(self.1, self.2 + block);
            send_for(lines.as_ptr().wrapping_add(BLOCKS_AHEAD * lines.len()), lines.len());
            // SAFETY: the caller's promise.
            unsafe { self.0.walk(self.1, self.2 + block, |pair, weights| emit(block * (BLOCK / 2) + pair, weights)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl super::tile::Rows for CodedPanel<'_> {
    fn after(self, k: usize) -> Self {
        // The first chain sends for all of it.
        CodedPanel(self.0, self.1, self.2 + k / BLOCK, &NOTHING)
    }
}

#[cfg(target_arch = "x86_64")]
impl super::tile::Weights for CodedPanel<'_> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn each16<const V: usize>(self, k: usize, mut emit: impl FnMut(usize, [__m512; V])) {
        let mut send_for_some = self.3.in_parts(k / BLOCK);
        for block in 0..k / BLOCK {
            send_for_some();
            // SAFETY: the caller's promise.
            unsafe {
                self.0.rows(self.1, self.2 + block, |row, weights| {
                    emit(block * BLOCK + row, std::array::from_fn(|v| weights[v]));
                });
            }
        }
    }
}
