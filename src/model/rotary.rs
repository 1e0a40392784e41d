//! Rotary frequencies (arXiv 2104.09864) and their scaling, and the tables of one step.

use std::f64::consts::PI;

use candle_core::{Device, Tensor};

use super::{ModelConfig, RopeScaling};
use crate::error::Result;

/// Cosines and sines of a step's positions, for global and for sliding layers.
pub struct Rotary {
    /// cos and sin: (N, D/2), f32.
    global: (Tensor, Tensor),
    /// Those of sliding layers, where they rotate at another base.
    local: Option<(Tensor, Tensor)>,
}

impl Rotary {
    /// The tables, (N, D/2) each, of a layer.
    pub(crate) fn of_layer(&self, is_sliding: bool) -> (&Tensor, &Tensor) {
        let (cos, sin) = self.local.as_ref().filter(|_| is_sliding).unwrap_or(&self.global);
        (cos, sin)
    }
}

/// A model's rotation per position, radians, for each pair of a head's dimensions.
pub(crate) struct Frequencies {
    global: Vec<f32>,
    local: Option<Vec<f32>>,
}

impl Frequencies {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Frequencies {
            global: inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling.as_ref()),
            local: config.rope_local_theta.map(|theta| inverse_frequencies(theta, config.head_dim, None)),
        }
    }

    /// positions: (N) → tables.
    pub(crate) fn tables(&self, positions: &[u32], device: &Device) -> Result<Rotary> {
        let local = self.local.as_ref().map(|frequencies| table(frequencies, positions, device)).transpose()?;
        Ok(Rotary { global: table(&self.global, positions, device)?, local })
    }
}

fn table(frequencies: &[f32], positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
    let shape = (positions.len(), frequencies.len());
    // The angle is rounded to f32, as every training framework does; checkpoints have learnt with it.
    let angles = || positions.iter().flat_map(|&position| frequencies.iter().map(move |f| position as f32 * f));
    let cos: Vec<f32> = angles().map(f32::cos).collect();
    let sin: Vec<f32> = angles().map(f32::sin).collect();
    Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
}

/// `1 / θ^(2i/D)` for i in 0..D/2, scaled. Power and quotient are rounded to f32 one after the other, as in transformers: one unit in
/// the last place turns what is at position 500 by up to 3e-5 radians.
fn inverse_frequencies(theta: f64, head_dim: usize, scaling: Option<&RopeScaling>) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let power = theta.powf(2.0 * pair as f64 / head_dim as f64) as f32;
            let frequency = f64::from(1.0 / power);
            match scaling {
                None => frequency as f32,
                Some(RopeScaling::Linear { factor }) => (frequency / factor) as f32,
                Some(&RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
                    // How often the pair turned round within the context of the first training: often is left alone,
                    // seldom is slowed by `factor`, and between the two borders it is blended.
                    let turns = original_context as f64 * frequency / (2.0 * PI);
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (frequency * (keep + (1.0 - keep) / factor)) as f32
                }
            }
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// transformers 5.23: `ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=64, hidden_size=2048, num_attention_heads=32,
    /// rope_parameters={rope_type: llama3, rope_theta: 500000, factor: 32, low_freq_factor: 1, high_freq_factor: 4,
    /// original_max_position_embeddings: 8192}), "cpu")[0][[0, 8, 14, 15, 16, 17, 18, 31]]`.
    #[test]
    fn llama3_bands_are_those_of_transformers() {
        let scaling =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let got = inverse_frequencies(5e5, 64, Some(&scaling));
        let wanted = [
            (0, 1.0),
            (8, 0.037_606_030_7),
            (14, 0.003_211_446_11),
            (15, 0.001_290_548_01),
            (16, 0.000_429_556_705),
            (17, 9.708_286_23e-5),
            (18, 1.946_163_87e-5),
            (31, 9.418_306_49e-8),
        ];
        for (pair, wanted) in wanted {
            let got = f64::from(got[pair]);
            assert!((got / wanted - 1.0f64).abs() < 1.2e-7, "{pair}: {got} against {wanted}");
        }
    }

    /// transformers 5.23: `LlamaRotaryEmbedding.compute_default_rope_parameters(LlamaConfig(head_dim=64, hidden_size=576,
    /// num_attention_heads=9, rope_parameters={rope_type: default, rope_theta: 1e5}))[0][[0, 4, 8, 12, 16, 31]]`.
    #[test]
    fn frequencies_are_those_of_transformers_to_the_bit() {
        let got = inverse_frequencies(1e5, 64, None);
        let wanted: [(usize, f32); 6] = [
            (0, 1.0),
            (4, 0.237_137_36),
            (8, 0.056_234_13),
            (12, 0.013_335_215),
            (16, 0.003_162_277_9),
            (31, 1.433_012_7e-5),
        ];
        for (pair, wanted) in wanted {
            assert_eq!(got[pair], wanted, "{pair}");
        }
    }

    #[test]
    fn tables_hold_the_angles_of_their_positions() {
        let frequencies = Frequencies { global: vec![1.0, 0.5], local: Some(vec![2.0, 0.25]) };
        let rotary = frequencies.tables(&[0, 7], &Device::Cpu).unwrap();
        let (cos, sin) = rotary.of_layer(false);
        assert_eq!(cos.to_vec2::<f32>().unwrap(), [[1.0, 1.0], [7f32.cos(), 3.5f32.cos()]]);
        assert_eq!(sin.to_vec2::<f32>().unwrap(), [[0.0, 0.0], [7f32.sin(), 3.5f32.sin()]]);
        let (cos, _) = rotary.of_layer(true);
        assert_eq!(cos.to_vec2::<f32>().unwrap()[1], [14f32.cos(), 1.75f32.cos()]);
    }
}
