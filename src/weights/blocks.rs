//! GGUF's quantized blocks taken apart: codes, scales and offsets, as the kernels want them.
//!
//! Layouts: ggml's `block_q4_0` … `block_q6_K` (<https://github.com/ggml-org/ggml>, `ggml-common.h`).

use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QTensor};
use half::f16;

use crate::error::Result;

/// A quantized matrix: number (n, k) is `scale·code + offset`, with one scale and one offset for each group of numbers of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Rows N.
    pub rows: usize,
    /// Columns K, a multiple of 32.
    pub columns: usize,
    /// Whether codes are 0..16; else they are -128..128.
    pub four_bits: bool,
    /// Numbers of a row in a group: 32 or 16.
    pub group: usize,
    /// (N, K).
    pub codes: Vec<i8>,
    /// (N, K / group).
    pub scales: Vec<f16>,
    /// (N, K / group), where the layout has offsets.
    pub offsets: Option<Vec<f16>>,
}

impl Blocks {
    /// Takes the blocks of a (rows, columns) tensor apart; `None` for a type that is no quantization, or one that the kernels have no
    /// form for (`Q2_K`, `Q3_K`): those are read as floats.
    pub(super) fn new(kind: GgmlDType, bytes: &[u8], rows: usize, columns: usize) -> Option<Self> {
        let (four_bits, group, has_offsets) = match kind {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => (true, 32, true),
            GgmlDType::Q5_1 | GgmlDType::Q5K => (false, 32, true),
            GgmlDType::Q5_0 | GgmlDType::Q8_0 => (false, 32, false),
            GgmlDType::Q6K => (false, 16, false),
            _ => return None,
        };
        let numbers = rows * columns;
        let mut blocks = Blocks {
            rows,
            columns,
            four_bits,
            group,
            codes: Vec::with_capacity(numbers),
            scales: Vec::with_capacity(numbers / group),
            offsets: has_offsets.then(|| Vec::with_capacity(numbers / group)),
        };
        for block in bytes.chunks_exact(kind.type_size()) {
            blocks.push(kind, block);
        }
        Some(blocks)
    }

    /// Codes of a (rows, columns) tensor of floats.
    pub fn quantize(tensor: &Tensor, kind: GgmlDType) -> Result<Option<Self>> {
        let (rows, columns) = tensor.dims2()?;
        if columns % kind.block_size() != 0 {
            return Ok(None);
        }
        let quantized = QTensor::quantize(tensor, kind)?;
        Ok(Blocks::new(kind, &quantized.data()?, rows, columns))
    }

    /// The rows in another order: row `order(n)` becomes row n.
    pub(super) fn reordered(self, order: impl Fn(usize) -> usize) -> Self {
        fn take<T: Copy>(from: &[T], rows: usize, order: &impl Fn(usize) -> usize) -> Vec<T> {
            let width = from.len() / rows.max(1);
            (0..rows).flat_map(|row| from[order(row) * width..][..width].iter().copied()).collect()
        }
        Blocks {
            codes: take(&self.codes, self.rows, &order),
            scales: take(&self.scales, self.rows, &order),
            offsets: self.offsets.as_ref().map(|offsets| take(offsets, self.rows, &order)),
            ..self
        }
    }

    fn scale(&mut self, scale: f16, offset: f16) {
        self.scales.push(scale);
        if let Some(offsets) = &mut self.offsets {
            offsets.push(offset);
        }
    }

    fn push(&mut self, kind: GgmlDType, block: &[u8]) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        let (low, high) = (|byte: &u8| byte & 15, |byte: &u8| byte >> 4);
        // The 32 four-bit halves of 16 bytes: all low ones, then all high ones.
        let nibbles = |bytes: &[u8]| -> Vec<u8> { bytes.iter().map(low).chain(bytes.iter().map(high)).collect() };
        let fifth = |bits: &[u8], at: usize| (bits[at / 8] >> (at % 8) & 1) << 4;
        match kind {
            GgmlDType::Q4_0 => {
                self.scale(half(0), f16::from_f32(-8.0 * half(0).to_f32()));
                self.codes.extend(nibbles(&block[2..]).iter().map(|code| *code as i8));
            }
            GgmlDType::Q4_1 => {
                self.scale(half(0), half(2));
                self.codes.extend(nibbles(&block[4..]).iter().map(|code| *code as i8));
            }
            GgmlDType::Q5_0 => {
                self.scale(half(0), f16::ZERO);
                let codes = nibbles(&block[6..]).into_iter().enumerate();
                self.codes.extend(codes.map(|(at, code)| (code | fifth(&block[2..6], at)) as i8 - 16));
            }
            GgmlDType::Q5_1 => {
                self.scale(half(0), half(2));
                let codes = nibbles(&block[8..]).into_iter().enumerate();
                self.codes.extend(codes.map(|(at, code)| (code | fifth(&block[4..8], at)) as i8));
            }
            GgmlDType::Q8_0 => {
                self.scale(half(0), f16::ZERO);
                self.codes.extend(block[2..].iter().map(|code| *code as i8));
            }
            GgmlDType::Q4K | GgmlDType::Q5K => {
                let (scale, least) = (half(0).to_f32(), half(2).to_f32());
                for group in 0..8 {
                    let (s, m) = six_bits(&block[4..16], group);
                    self.scale(f16::from_f32(scale * f32::from(s)), f16::from_f32(-least * f32::from(m)));
                }
                // 64 numbers share 32 bytes; of the fifth bits, bit g belongs to group g.
                let (fifths, codes) =
                    if kind == GgmlDType::Q5K { block[16..].split_at(32) } else { block[16..].split_at(0) };
                for group in 0..8 {
                    let codes = codes[group / 2 * 32..][..32].iter().enumerate();
                    self.codes.extend(codes.map(|(at, byte)| {
                        let code = if group % 2 == 0 { low(byte) } else { high(byte) };
                        (code | fifths.get(at).map_or(0, |bits| (bits >> group & 1) << 4)) as i8
                    }));
                }
            }
            GgmlDType::Q6K => {
                let (lows, highs, scales) = (&block[..128], &block[128..192], &block[192..208]);
                let scale = half(208).to_f32();
                for group in scales {
                    self.scale(f16::from_f32(scale * f32::from(*group as i8)), f16::ZERO);
                }
                for at in 0..256 {
                    let (part, at) = (at / 128, at % 128);
                    let byte = lows[part * 64 + at % 64];
                    let code = if at < 64 { low(&byte) } else { high(&byte) };
                    let top = highs[part * 32 + at % 32] >> (at / 32 * 2) & 3;
                    self.codes.push((code | top << 4) as i8 - 32);
                }
            }
            _ => {}
        }
    }
}

/// The K-quants' scale and least value of a group, six bits each, packed into twelve bytes.
fn six_bits(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let (low, top) = (packed[group + 4], (packed[group - 4] >> 6, packed[group] >> 6));
    (low & 15 | top.0 << 4, low >> 4 | top.1 << 4)
}
