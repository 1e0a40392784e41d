//! Every GGUF tensor type against the `gguf` package (tests/fixtures/make_gguf_types.py), and files that are broken.

use candle_core::{DType, Device};
use rdpo::weights::Checkpoint;

use super::hot_swap::fixture;

/// In the order of the fixture's layers.
const TYPES: [&str; 11] = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"];

#[test]
fn every_type_is_read_as_the_gguf_package_reads_it() {
    let checkpoint = Checkpoint::open(&fixture("gguf-types.gguf")).unwrap();
    let expected = candle_core::safetensors::load(fixture("gguf-types.safetensors"), &Device::Cpu).unwrap();
    for (layer, kind) in TYPES.iter().enumerate() {
        let name = format!("model.layers.{layer}.mlp.gate_proj.weight");
        let found = checkpoint.get(&name, &[4, 512], DType::F32, &Device::Cpu).unwrap();
        let gap = (&found - &expected[*kind]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let largest = expected[*kind].abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(largest > 0.1 && gap <= largest * 1e-6, "{kind}: {gap} of {largest}");
    }
    let error = checkpoint.get("model.layers.0.mlp.gate_proj.weight", &[4, 4], DType::F32, &Device::Cpu).unwrap_err();
    assert_eq!((error.status(), error.param.as_deref()), (422, Some("model.layers.0.mlp.gate_proj.weight")));
}

/// Codes, scales and offsets give the numbers back, but for the rounding of the K-quants' scales to f16.
#[test]
fn every_quantized_type_is_taken_apart() {
    let checkpoint = Checkpoint::open(&fixture("gguf-types.gguf")).unwrap();
    let expected = candle_core::safetensors::load(fixture("gguf-types.safetensors"), &Device::Cpu).unwrap();
    for (layer, kind) in TYPES.iter().enumerate() {
        let blocks = checkpoint.blocks(&format!("model.layers.{layer}.mlp.gate_proj.weight"), [4, 512]).unwrap();
        let Some(blocks) = blocks else {
            assert!(["F32", "F16", "BF16"].contains(kind), "{kind} is quantized");
            continue;
        };
        let wanted = expected[*kind].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let largest = wanted.iter().fold(0f32, |most, number| most.max(number.abs()));
        let tolerance = if kind.ends_with('K') { 1e-3 } else { 1e-6 };
        for (at, (code, wanted)) in blocks.codes.iter().zip(&wanted).enumerate() {
            assert!(!blocks.four_bits || (0..16).contains(code));
            let offset = blocks.offsets.as_ref().map_or(0.0, |offsets| offsets[at / blocks.group].to_f32());
            let found = blocks.scales[at / blocks.group].to_f32() * f32::from(*code) + offset;
            assert!((found - wanted).abs() <= largest * tolerance, "{kind} {at}: {found}, not {wanted}");
        }
    }
    let error = checkpoint.blocks("model.layers.3.mlp.gate_proj.weight", [4, 4]).unwrap_err();
    assert_eq!(error.status(), 422);
}

#[test]
fn a_cut_or_foreign_file_is_named() {
    let whole = std::fs::read(fixture("gguf-types.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.gguf");
    for bytes in [&whole[..whole.len() - 100], &whole[..64], b"not a model at all", b""] {
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&path).err().unwrap();
        assert_eq!(error.status(), 422);
        assert!(error.to_string().contains("broken.gguf"), "{error}");
    }
}
