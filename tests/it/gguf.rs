//! Every GGUF tensor type against the `gguf` package (tests/fixtures/make_gguf_types.py), and files that are broken.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use rdpo::model::{ModelConfig, RopeScaling};
use rdpo::text::Tokenizer;
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

/// A tiny model's file with this metadata changed, whose `attn_k` has this many rows.
fn write(path: &Path, changed: &[(&str, Value)], key_rows: usize) {
    write_with(path, changed, key_rows, &[]);
}

/// The same with more tensors.
fn write_with(path: &Path, changed: &[(&str, Value)], key_rows: usize, more: &[(&str, &[f32])]) {
    let number = |name: &'static str, value| (name, Value::U32(value));
    let mut metadata = vec![
        ("general.architecture", Value::String("llama".into())),
        number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 2),
        number("llama.embedding_length", 32),
        number("llama.block_count", 1),
        number("llama.feed_forward_length", 32),
        number("llama.context_length", 64),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    metadata.retain(|(name, _)| changed.iter().all(|(other, _)| other != name));
    let metadata: Vec<_> = metadata.iter().chain(changed).map(|(name, value)| (*name, value)).collect();
    let zeros = |rows| {
        let zeros = Tensor::zeros((rows, 32), DType::F32, &Device::Cpu).unwrap();
        QTensor::quantize(&zeros, GgmlDType::Q8_0).unwrap()
    };
    let (embedding, key) = (zeros(4), zeros(key_rows));
    let float =
        |values: &[f32]| QTensor::quantize(&Tensor::new(values, &Device::Cpu).unwrap(), GgmlDType::F32).unwrap();
    let more: Vec<_> = more.iter().map(|(name, values)| (*name, float(values))).collect();
    let mut tensors = vec![("token_embd.weight", &embedding), ("blk.0.attn_k.weight", &key)];
    tensors.extend(more.iter().map(|(name, tensor)| (*name, tensor)));
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn what_a_layer_has_and_the_decoder_would_not_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("more.gguf");
    let open = |more: &[(&str, &[f32])]| {
        write_with(&path, &[], 32, more);
        Checkpoint::open(&path).map(|checkpoint| ModelConfig::from_json(checkpoint.config()).unwrap())
    };
    let zeros: &[f32] = &[0.0; 32];
    assert!(!open(&[]).unwrap().qkv_bias);
    let biased = open(&[("blk.0.attn_q.bias", zeros), ("blk.0.attn_output.bias", zeros)]).unwrap();
    assert!(biased.qkv_bias && biased.o_bias);
    for name in ["blk.0.ffn_up.bias", "blk.0.attn_sinks.weight", "blk.0.attn_q.scale"] {
        let error = open(&[(name, zeros)]).unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (422, Some(name)));
    }
}

#[test]
fn rotary_factors_are_llama_3s_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("factors.gguf");
    // Heads of 16 at base 10000: 8192 tokens turn the slowest pair once and two thirds of a time.
    let turns = |index: usize| 8192.0 * 10000f32.powf(-(index as f32) / 8.0) / std::f32::consts::TAU;
    let factors = |context: f32| -> Vec<f32> {
        let smooth = |index| ((turns(index) * context / 8192.0 - 1.0) / 3.0).clamp(0.0, 1.0);
        (0..8).map(|index| 1.0 / ((1.0 - smooth(index)) / 8.0 + smooth(index))).collect()
    };
    let open = |factors: &[f32]| {
        // A pair that is stretched whole has the scaling's own factor.
        write_with(&path, &[("llama.rope.freq_base", Value::F32(10000.0))], 32, &[("rope_freqs.weight", factors)]);
        Checkpoint::open(&path).map(|checkpoint| ModelConfig::from_json(checkpoint.config()).unwrap().rope_scaling)
    };
    let error = open(&factors(64.0)).unwrap_err();
    assert_eq!((error.status(), error.param.as_deref()), (422, Some("rope_freqs.weight")));
    let plain = open(&[1.0; 8]).unwrap();
    assert_eq!(
        plain,
        Some(RopeScaling::Llama3 { factor: 1.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 })
    );
}

#[test]
fn rotary_scaling_of_another_type_than_linear_is_not_taken_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scaled.gguf");
    let factor = ("llama.rope.scaling.factor", Value::F32(4.0));
    let config = |kind: &str| {
        let kind = ("llama.rope.scaling.type", Value::String(kind.into()));
        write(&path, &[factor.clone(), kind], 32);
        ModelConfig::from_json(Checkpoint::open(&path).unwrap().config())
    };
    let linear = Some(RopeScaling::Linear { factor: 4.0 });
    assert_eq!(config("linear").unwrap().rope_scaling, linear);
    assert_eq!(config("none").unwrap().rope_scaling, None);
    let error = config("yarn").unwrap_err();
    assert_eq!((error.status(), error.param.as_deref()), (422, Some("rope_scaling.rope_type")));
    write(&path, &[factor], 32);
    let older = ModelConfig::from_json(Checkpoint::open(&path).unwrap().config()).unwrap();
    assert_eq!(older.rope_scaling, linear, "files older than the key");
    write(&path, &[("llama.rope.scale_linear", Value::F32(4.0))], 32);
    let oldest = ModelConfig::from_json(Checkpoint::open(&path).unwrap().config()).unwrap();
    assert_eq!(oldest.rope_scaling, linear, "and files older than that");
}

#[test]
fn sizes_that_make_no_sense_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.gguf");
    write(&path, &[("general.alignment", Value::U32(0))], 32);
    assert_eq!(Checkpoint::open(&path).err().unwrap().status(), 422);
    // Rows that are no two heads of pairs, and no heads at all.
    for (heads, rows) in [(2, 2), (0, 32)] {
        write(&path, &[("llama.attention.head_count_kv", Value::U32(heads))], rows);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let name = "model.layers.0.self_attn.k_proj.weight";
        let error = checkpoint.blocks(name, [rows, 32]).map(drop).unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (422, Some(name)));
        assert_eq!(checkpoint.get(name, &[rows, 32], DType::F32, &Device::Cpu).unwrap_err().status(), 422);
    }
}

/// llama.cpp sets `ignore_merges` and `add_bos` for Llama 3's pre-tokenizer (its PR #7193).
#[test]
fn llama_3s_words_are_whole_and_its_texts_begin_with_bos() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("words.gguf");
    let text = |text: &str| Value::String(text.into());
    let texts = |all: &[&str]| Value::Array(all.iter().map(|one| text(one)).collect());
    let ids = |pre: &str| {
        let words = [
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.tokens", texts(&["A", "a", "B", "Aa", "AaB", "<s>"])),
            ("tokenizer.ggml.merges", texts(&["A a"])),
            ("tokenizer.ggml.bos_token_id", Value::U32(5)),
        ];
        write(&path, &words, 32);
        let options = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
        Tokenizer::new(options).unwrap().encode("AaB", true).unwrap()
    };
    assert_eq!(ids("llama-bpe"), [5, 4]);
    assert_eq!(ids("default"), [3, 2]);
}
