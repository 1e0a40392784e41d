//! In what form the weights are held.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};

use crate::error::{Error, Result};

/// How the linear weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// As f32, f16 or bf16.
    Float(DType),
    /// As the codes that the file has, read as bf16; what the file has as floats is held in bf16.
    Stored,
    /// As codes made when the model is loaded, read as bf16: `Q8_0`, `Q4_1` or `Q4K`. The embedding and the head are `Q8_0` in any case,
    /// and rows that are no multiple of 256 are `Q4_1` where `Q4K` was asked for.
    Quantized(GgmlDType),
}

/// What a configuration's `dtype` may be.
const NAMES: [(&str, WeightFormat); 7] = [
    ("auto", WeightFormat::Stored),
    ("f32", WeightFormat::Float(DType::F32)),
    ("bf16", WeightFormat::Float(DType::BF16)),
    ("f16", WeightFormat::Float(DType::F16)),
    ("q8_0", WeightFormat::Quantized(GgmlDType::Q8_0)),
    ("q4_1", WeightFormat::Quantized(GgmlDType::Q4_1)),
    ("q4_k", WeightFormat::Quantized(GgmlDType::Q4K)),
];

impl FromStr for WeightFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, format)| *format).ok_or_else(|| {
            let known = NAMES.map(|(name, _)| format!("`{name}`")).join(", ");
            Error::invalid("dtype", format!("`{name}` is none of {known}"))
        })
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(_, known)| known == self).map_or("auto", |(name, _)| name))
    }
}

/// Where and how to hold the weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Device of the weights. Codes are kept on the CPU only; on a GPU the same numbers are in bf16.
    pub device: Device,
    /// Linear weights. On the CPU activations are f32 whatever this is (a product with bf16 weights or codes may round its
    /// input); on a GPU they have the weights' dtype.
    pub weights: WeightFormat,
}

impl LoadOptions {
    /// Dtype of activations.
    pub fn compute_dtype(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { self.float_dtype() }
    }

    /// Dtype of the linear weights that are not held as codes.
    pub fn float_dtype(&self) -> DType {
        match self.weights {
            WeightFormat::Float(dtype) => dtype,
            WeightFormat::Stored | WeightFormat::Quantized(_) => DType::BF16,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, format) in NAMES {
            assert_eq!((name.parse::<WeightFormat>().unwrap(), format.to_string()), (format, name.to_owned()));
        }
        assert!("int8".parse::<WeightFormat>().unwrap_err().to_string().contains("`q8_0`"));
    }
}
