//! Products with a frozen weight that was packed once. Every output row is summed over K in order by one chain of fused
//! multiply-adds, so it does not depend on how many rows the call has.

use half::{bf16, f16};
use rayon::prelude::*;

/// Columns of a panel: two AVX-512 registers of f32.
const PANEL: usize = 32;
/// Rows a microkernel takes: 12 × 2 accumulators of the 32 registers.
const ROWS: usize = 12;
/// Rows a task takes, so that its panel stays in cache.
const ROW_BLOCK: usize = 96;

/// How the weight's numbers are stored; products are f32 in all.
#[derive(Clone, Debug)]
pub enum Width {
    /// 4 bytes.
    F32(Vec<f32>),
    /// 2 bytes, exponent of f32.
    Bf16(Vec<bf16>),
    /// 2 bytes, IEEE half.
    F16(Vec<f16>),
}

/// A weight W: (N, K) as panels `(⌈N/32⌉, K, 32)`, zero-padded.
#[derive(Clone, Debug)]
pub struct Packed {
    n: usize,
    k: usize,
    width: Width,
}

/// A number that a panel may hold.
trait Stored: Copy + Default + Send + Sync {
    fn widen(self) -> f32;
    /// # Safety
    /// `from` has 16 elements; the processor has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512;
    /// # Safety
    /// `from` has 8 elements; the processor has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256;
}

impl Stored for f32 {
    fn widen(self) -> f32 {
        self
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Stored for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
    }
}

impl Stored for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

/// `out[r][c] = Σ_k x[r][k] · panel[k][c]` for M rows and 32 columns, each sum in order of k.
/// x has rows `stride` apart; out has rows `out_stride` apart and `columns` ≤ 32 of the panel are stored.
struct Tile<'a, W> {
    x: &'a [f32],
    stride: usize,
    panel: &'a [W],
    k: usize,
    columns: usize,
}

impl<W: Stored> Tile<'_, W> {
    /// # Safety
    /// The processor has AVX-512F; `out` has room for M rows of `columns`, `out_stride` apart.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const M: usize>(&self, out: *mut f32, out_stride: usize) {
        use std::arch::x86_64::*;
        let mut low = [_mm512_setzero_ps(); M];
        let mut high = [_mm512_setzero_ps(); M];
        let (x, panel) = (self.x.as_ptr(), self.panel.as_ptr());
        debug_assert!(self.x.len() >= (M - 1) * self.stride + self.k && self.panel.len() >= self.k * PANEL);
        for k in 0..self.k {
            // SAFETY: k < self.k, r < M: inside the slices by the assertion above; the caller's promise for the rest.
            unsafe {
                let (left, right) = (W::load16(panel.add(k * PANEL)), W::load16(panel.add(k * PANEL + 16)));
                for r in 0..M {
                    let value = _mm512_set1_ps(*x.add(r * self.stride + k));
                    low[r] = _mm512_fmadd_ps(value, left, low[r]);
                    high[r] = _mm512_fmadd_ps(value, right, high[r]);
                }
            }
        }
        let mask = |columns: usize| if columns >= 16 { 0xffffu16 } else { (1u16 << columns) - 1 };
        for r in 0..M {
            // SAFETY: the caller's promise; the masks leave out what is past `columns`.
            unsafe {
                _mm512_mask_storeu_ps(out.add(r * out_stride), mask(self.columns), low[r]);
                if self.columns > 16 {
                    _mm512_mask_storeu_ps(out.add(r * out_stride + 16), mask(self.columns - 16), high[r]);
                }
            }
        }
    }

    /// As [`Self::avx512`] for the V·8 columns from `first`: V = 4 is the whole panel, and six rows of V = 2 fill the registers.
    /// # Safety
    /// The processor has AVX2, FMA and F16C; `out` has room for M rows of `columns`, `out_stride` apart.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<const M: usize, const V: usize>(&self, first: usize, out: *mut f32, out_stride: usize) {
        use std::arch::x86_64::*;
        if self.columns <= first {
            return;
        }
        let mut sums = [[_mm256_setzero_ps(); V]; M];
        let (x, panel) = (self.x.as_ptr(), self.panel.as_ptr());
        debug_assert!(self.x.len() >= (M - 1) * self.stride + self.k && self.panel.len() >= self.k * PANEL);
        for k in 0..self.k {
            // SAFETY: k < self.k, r < M, first + 8·V ≤ PANEL: inside the slices by the assertion above.
            unsafe {
                let mut weights = [_mm256_setzero_ps(); V];
                for (v, weights) in weights.iter_mut().enumerate() {
                    *weights = W::load8(panel.add(k * PANEL + first + v * 8));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = _mm256_set1_ps(*x.add(r * self.stride + k));
                    for v in 0..V {
                        sums[v] = _mm256_fmadd_ps(value, weights[v], sums[v]);
                    }
                }
            }
        }
        let mut row = [0f32; PANEL];
        let columns = (self.columns - first).min(V * 8);
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: row has room for V·8 ≤ PANEL; the caller's promise for out.
            unsafe {
                for (v, sums) in sums.iter().enumerate() {
                    _mm256_storeu_ps(row.as_mut_ptr().add(v * 8), *sums);
                }
                std::ptr::copy_nonoverlapping(row.as_ptr(), out.add(r * out_stride + first), columns);
            }
        }
    }

    /// # Safety
    /// As [`Self::avx2`], for any number of rows.
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2_rows(&self, rows: usize, out: *mut f32, out_stride: usize) {
        const AT_ONCE: usize = 6;
        for row in (0..rows).step_by(AT_ONCE) {
            let tile = Tile { x: &self.x[row * self.stride..], ..*self };
            // SAFETY: the caller's promise.
            unsafe {
                let out = out.add(row * out_stride);
                match rows - row {
                    1 => tile.avx2::<1, 4>(0, out, out_stride),
                    2 => tile.avx2::<2, 4>(0, out, out_stride),
                    3 => [0, 16].iter().for_each(|&first| tile.avx2::<3, 2>(first, out, out_stride)),
                    4 => [0, 16].iter().for_each(|&first| tile.avx2::<4, 2>(first, out, out_stride)),
                    5 => [0, 16].iter().for_each(|&first| tile.avx2::<5, 2>(first, out, out_stride)),
                    _ => [0, 16].iter().for_each(|&first| tile.avx2::<AT_ONCE, 2>(first, out, out_stride)),
                }
            }
        }
    }

    /// The same sums without vector instructions of our choosing.
    /// # Safety
    /// `out` has room for `rows` rows of `columns`, `out_stride` apart.
    unsafe fn portable(&self, rows: usize, out: *mut f32, out_stride: usize) {
        for r in 0..rows {
            let mut sums = [0f32; PANEL];
            let row = &self.x[r * self.stride..r * self.stride + self.k];
            for (value, panel) in row.iter().zip(self.panel.chunks_exact(PANEL)) {
                for (sum, weight) in sums.iter_mut().zip(panel) {
                    // Not fused: without the instruction that is a call for each number.
                    *sum += value * weight.widen();
                }
            }
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), out.add(r * out_stride), self.columns) };
        }
    }

    /// # Safety
    /// `out` has room for `rows` rows of `columns`, `out_stride` apart.
    unsafe fn run(&self, level: Level, rows: usize, out: *mut f32, out_stride: usize) {
        // SAFETY: `level` is what the processor has; the caller's promise for `out`.
        unsafe {
            match level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => match rows {
                    1 => self.avx512::<1>(out, out_stride),
                    2 => self.avx512::<2>(out, out_stride),
                    3 => self.avx512::<3>(out, out_stride),
                    4 => self.avx512::<4>(out, out_stride),
                    5 => self.avx512::<5>(out, out_stride),
                    6 => self.avx512::<6>(out, out_stride),
                    7 => self.avx512::<7>(out, out_stride),
                    8 => self.avx512::<8>(out, out_stride),
                    9 => self.avx512::<9>(out, out_stride),
                    10 => self.avx512::<10>(out, out_stride),
                    11 => self.avx512::<11>(out, out_stride),
                    _ => self.avx512::<ROWS>(out, out_stride),
                },
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => self.avx2_rows(rows, out, out_stride),
                Level::Portable => self.portable(rows, out, out_stride),
            }
        }
    }
}

/// What the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// A raw output that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every task writes its own rows and columns only.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

impl Packed {
    /// Packs W: (N, K), row-major.
    pub fn new(weight: &Width, n: usize, k: usize) -> Self {
        let width = match weight {
            Width::F32(weight) => Width::F32(pack(weight, n, k)),
            Width::Bf16(weight) => Width::Bf16(pack(weight, n, k)),
            Width::F16(weight) => Width::F16(pack(weight, n, k)),
        };
        Packed { n, k, width }
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
        match &self.width {
            Width::F32(panels) => panels.len() * 4,
            Width::Bf16(panels) => panels.len() * 2,
            Width::F16(panels) => panels.len() * 2,
        }
    }

    /// `x·Wᵀ`. x: (M, K) → (M, N), both row-major.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        match &self.width {
            Width::F32(panels) => self.forward_with(panels, x, level()),
            Width::Bf16(panels) => self.forward_with(panels, x, level()),
            Width::F16(panels) => self.forward_with(panels, x, level()),
        }
    }

    /// `dy·W`, the gradient of the input. dy: (M, N) → (M, K).
    pub fn backward(&self, dy: &[f32]) -> Vec<f32> {
        match &self.width {
            Width::F32(panels) => self.backward_with(panels, dy, level()),
            Width::Bf16(panels) => self.backward_with(panels, dy, level()),
            Width::F16(panels) => self.backward_with(panels, dy, level()),
        }
    }

    /// Row `n` of W into `out`: (K).
    pub fn row(&self, n: usize, out: &mut [f32]) {
        match &self.width {
            Width::F32(panels) => self.row_with(panels, n, out),
            Width::Bf16(panels) => self.row_with(panels, n, out),
            Width::F16(panels) => self.row_with(panels, n, out),
        }
    }

    fn row_with<W: Stored>(&self, panels: &[W], n: usize, out: &mut [f32]) {
        let from = n / PANEL * self.k * PANEL + n % PANEL;
        for (k, value) in out.iter_mut().enumerate() {
            *value = panels[from + k * PANEL].widen();
        }
    }

    fn forward_with<W: Stored>(&self, panels: &[W], x: &[f32], level: Level) -> Vec<f32> {
        let (n, k) = (self.n, self.k);
        let m = x.len() / k;
        let mut y = vec![0f32; m * n];
        let out = Out(y.as_mut_ptr());
        let count = n.div_ceil(PANEL);
        // A few tasks a thread: enough to even out, few enough to cost nothing when one row is read.
        let together = count.div_ceil(rayon::current_num_threads() * 4).max(1);
        let blocks = m.div_ceil(ROW_BLOCK);
        (0..blocks * count.div_ceil(together)).into_par_iter().for_each(|task| {
            let (block, group) = (task % blocks, task / blocks);
            let rows = block * ROW_BLOCK..m.min((block + 1) * ROW_BLOCK);
            for panel in group * together..count.min((group + 1) * together) {
                let columns = PANEL.min(n - panel * PANEL);
                let weights = &panels[panel * k * PANEL..(panel + 1) * k * PANEL];
                for row in rows.clone().step_by(ROWS) {
                    let tile = Tile { x: &x[row * k..], stride: k, panel: weights, k, columns };
                    // SAFETY: rows and columns are inside y and no other task has them.
                    unsafe { tile.run(level, ROWS.min(rows.end - row), out.at(row * n + panel * PANEL), n) };
                }
            }
        });
        y
    }

    fn backward_with<W: Stored>(&self, panels: &[W], dy: &[f32], level: Level) -> Vec<f32> {
        let (n, k) = (self.n, self.k);
        let m = dy.len() / n;
        let mut dx = vec![0f32; m * k];
        let out = Out(dx.as_mut_ptr());
        (0..k.div_ceil(PANEL)).into_par_iter().for_each_init(
            || vec![0f32; n * PANEL],
            |transposed, panel| {
                let columns = PANEL.min(k - panel * PANEL);
                // The panel over k for all n: 32 × 32 tiles of the forward panels, transposed.
                for row in 0..n {
                    let from = row / PANEL * k * PANEL + row % PANEL;
                    let to = &mut transposed[row * PANEL..row * PANEL + columns];
                    for (column, value) in to.iter_mut().enumerate() {
                        *value = panels[from + (panel * PANEL + column) * PANEL].widen();
                    }
                }
                for row in (0..m).step_by(ROWS) {
                    let tile = Tile { x: &dy[row * n..], stride: n, panel: transposed, k: n, columns };
                    // SAFETY: rows and columns are inside dx and no other task has them.
                    unsafe { tile.run(level, ROWS.min(m - row), out.at(row * k + panel * PANEL), k) };
                }
            },
        );
        dx
    }
}

fn pack<W: Stored>(weight: &[W], n: usize, k: usize) -> Vec<W> {
    let mut panels = vec![W::default(); n.div_ceil(PANEL) * k * PANEL];
    panels.par_chunks_mut(k * PANEL).enumerate().for_each(|(panel, out)| {
        for column in 0..PANEL.min(n - panel * PANEL) {
            let row = &weight[(panel * PANEL + column) * k..][..k];
            for (at, value) in row.iter().enumerate() {
                out[at * PANEL + column] = *value;
            }
        }
    });
    panels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn every_width_and_level_is_the_plain_product_and_rows_stand_alone() {
        let (n, k) = (70, 45);
        let weight = numbers(n * k, 1);
        let halves = Width::Bf16(weight.iter().map(|value| bf16::from_f32(*value)).collect());
        let thin = Width::F16(weight.iter().map(|value| f16::from_f32(*value)).collect());
        for width in [Width::F32(weight), halves, thin] {
            let packed = Packed::new(&width, n, k);
            let mut rows = vec![0f32; n * k];
            rows.chunks_mut(k).enumerate().for_each(|(row, out)| packed.row(row, out));
            for m in [1, 2, 3, 4, 5, 6, 12, 13, 100] {
                let (x, dy) = (numbers(m * k, 2), numbers(m * n, 3));
                let (y, dx) = (packed.forward(&x), packed.backward(&dy));
                for row in 0..m {
                    for column in 0..n {
                        let exact: f64 =
                            (0..k).map(|at| f64::from(x[row * k + at]) * f64::from(rows[column * k + at])).sum();
                        assert!((f64::from(y[row * n + column]) - exact).abs() < 1e-4);
                    }
                    for column in 0..k {
                        let exact: f64 =
                            (0..n).map(|at| f64::from(dy[row * n + at]) * f64::from(rows[at * k + column])).sum();
                        assert!((f64::from(dx[row * k + column]) - exact).abs() < 1e-4);
                    }
                    assert_eq!(
                        packed.forward(&x[row * k..(row + 1) * k]),
                        y[row * n..(row + 1) * n],
                        "row {row} of {m} stands alone"
                    );
                }
            }
        }
    }

    #[test]
    fn portable_code_agrees_with_the_chosen_kernel() {
        let (m, n, k) = (7, 33, 20);
        let weight = numbers(n * k, 4);
        let packed = Packed::new(&Width::F32(weight), n, k);
        let Width::F32(panels) = &packed.width else { unreachable!("packed as f32") };
        let x = numbers(m * k, 5);
        let (fast, plain) = (packed.forward(&x), packed.forward_with(panels, &x, Level::Portable));
        assert!(fast.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-5));
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            assert_eq!(fast, packed.forward_with(panels, &x, Level::Avx2), "one chain of fused multiply-adds each");
        }
    }
}
