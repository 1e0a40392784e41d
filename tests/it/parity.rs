//! The decoder against PyTorch, transformers and PEFT, on the tiny models of `tests/fixtures/make_fixtures.py`, on the device of
//! `device.rs`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rdpo::error::Result;
use rdpo::model::{Adapter, Attend, Decoder, KvPool, LoadOptions, LoraParams, LoraRows, RowGroup, SITES, WeightFormat};
use rdpo::ops::{CausalMask, PagedBatch, PagedSequence, Segment, record, token_logprobs};
use rdpo::weights::{AdapterFile, Checkpoint, LoraConfig};
use serde_json::Value;

use super::device::{device, dtype, fixtures, numbers as flat, tolerance};
use super::engine::CLASSIFIERS;

const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];

/// Largest difference of a logit or log-prob in f32.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// Largest difference of a gradient as a share of the largest value of its tensor.
const GRADIENT_TOLERANCE: f32 = 1e-3;
/// In bf16, which keeps 8 bits, and with a GPU's order of additions: the root mean square of what a tensor's logits or log-probs are off, as a
/// share of their own. PyTorch's bf16 is off by up to 0.035 on these fixtures.
const LOGIT_TOLERANCE_BF16: f32 = 0.07;
/// Of gradients in bf16, likewise. PyTorch's are off by up to 0.18 (Qwen2's, whose first layer is ill-conditioned).
const GRADIENT_TOLERANCE_BF16: f32 = 0.24;

/// How far off numbers are, and how far they may be: the largest difference in f32, else the root mean square as a share of what is wanted.
fn off_by(got: &Tensor, wanted: &Tensor, [in_f32, in_bf16]: [f32; 2]) -> (f32, f32) {
    let most = tolerance(in_f32, in_bf16);
    if dtype() == DType::F32 {
        return (largest_gap(got, wanted), most);
    }
    let (got, wanted) = (flat(got), flat(wanted));
    assert_eq!(got.len(), wanted.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    let gap = norm(&mut got.iter().zip(&wanted).map(|(a, b)| a - b));
    (gap / norm(&mut wanted.iter().copied()), most)
}

fn logits_off_by(got: &Tensor, wanted: &Tensor) -> (f32, f32) {
    off_by(got, wanted, [LOGIT_TOLERANCE, LOGIT_TOLERANCE_BF16])
}

fn largest(tensor: &Tensor) -> f32 {
    flat(tensor).into_iter().fold(0f32, |largest, value| largest.max(value.abs()))
}

/// Bit for bit on the CPU, whose rows do not depend on each other; else as near as the rest must be.
fn same(a: &Tensor, b: &Tensor) -> bool {
    let (gap, most) = logits_off_by(a, b);
    if device().is_cpu() { bits(a) == bits(b) } else { gap < most }
}

struct Fixture {
    name: &'static str,
    model: Decoder,
    adapter: AdapterFile,
    sequences: Vec<Vec<u32>>,
    expected: Value,
    tensors: HashMap<String, Tensor>,
}

fn folder(name: &str) -> PathBuf {
    fixtures().join(format!("tiny-{name}"))
}

fn load(name: &str, dtype: DType) -> Decoder {
    let checkpoint = Checkpoint::open(&folder(name)).unwrap();
    Decoder::load(&checkpoint, &LoadOptions { device: device().clone(), weights: WeightFormat::Float(dtype) }).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn expected(name: &str) -> (Value, Vec<Vec<u32>>) {
    let text = std::fs::read(folder(name).join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    let sequences = expected["sequences"].as_array().unwrap().iter().map(ids).collect();
    (expected, sequences)
}

fn fixture(name: &'static str) -> Fixture {
    let (expected, sequences) = expected(name);
    Fixture {
        name,
        model: load(name, dtype()),
        adapter: AdapterFile::read(&folder(name).join("adapter")).unwrap(),
        sequences,
        expected,
        tensors: candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu).unwrap(),
    }
}

impl Fixture {
    fn params(&self) -> LoraParams {
        LoraParams::from_file(&self.adapter, &self.model).unwrap()
    }

    fn published(&self) -> Arc<Adapter> {
        Arc::new(Adapter::from_file(&self.adapter, &self.model).unwrap())
    }

    fn check(&self, key: &str, got: &Tensor) {
        let (gap, most) = logits_off_by(got, &self.tensors[key]);
        assert!(gap < most, "{} {key}: off by {gap}", self.name);
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    flat(tensor).into_iter().map(f32::to_bits).collect()
}

fn largest_gap(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    flat(a)
        .into_iter()
        .zip(flat(b))
        .fold(0.0, |worst, (a, b)| if (a - b).abs() <= worst { worst } else { (a - b).abs() })
}

fn segment(start: usize, len: usize) -> Segment {
    Segment { start, len, prefix: 0..0 }
}

/// One flat step of sequences that do not see each other.
fn mask(lengths: &[usize]) -> CausalMask {
    let mut start = 0;
    let segments = lengths.iter().map(|&len| {
        start += len;
        segment(start - len, len)
    });
    let segments = segments.collect();
    CausalMask::new(segments, lengths.iter().flat_map(|&len| 0..len as u32).collect())
}

fn hidden(model: &Decoder, ids: &[u32], mask: &CausalMask, lora: LoraRows<'_>) -> Tensor {
    model.forward(ids, &mask.positions, Attend::Causal(mask), lora).unwrap()
}

fn logits(model: &Decoder, ids: &[u32], lora: LoraRows<'_>) -> Tensor {
    model.logits(&hidden(model, ids, &mask(&[ids.len()]), lora)).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        for (index, ids) in fixture.sequences.iter().enumerate() {
            fixture.check(&format!("base.{index}"), &logits(&fixture.model, ids, LoraRows::Base));
        }
    }
}

#[test]
fn adapters_of_peft_give_its_logits_trained_and_served() {
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        let params = fixture.params();
        let groups = |len| [RowGroup { start: 0, len, adapter: Some(fixture.published()) }];
        for (index, ids) in fixture.sequences.iter().enumerate() {
            let trained = logits(&fixture.model, ids, LoraRows::Train { params: &params, dropout_seed: None });
            fixture.check(&format!("adapter.{index}"), &trained);
            let served = logits(&fixture.model, ids, LoraRows::Served(&groups(ids.len())));
            assert!(same(&trained, &served), "{name}: the published adapter is not the trained one");
        }
    }
}

#[test]
fn token_log_probs_are_those_of_peft() {
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        let params = fixture.params();
        for (index, ids) in fixture.sequences.iter().enumerate() {
            let last = ids.len() - 1;
            let lora = LoraRows::Train { params: &params, dropout_seed: None };
            let hidden = hidden(&fixture.model, &ids[..last], &mask(&[last]), lora);
            let got = token_logprobs(&hidden, fixture.model.head().unwrap(), &ids[1..], &mut || Ok(())).unwrap();
            fixture.check(&format!("logprobs.{index}"), &got);
        }
    }
}

/// Sequences of one step, some under the adapter and some under the base, come out as alone.
#[test]
fn one_step_mixes_sequences_and_adapters() {
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        let adapter = fixture.published();
        let lengths: Vec<usize> = fixture.sequences.iter().map(Vec::len).collect();
        let adapters = [Some(adapter.clone()), None, Some(adapter)];
        let mut groups = Vec::new();
        for (len, adapter) in lengths.iter().zip(adapters) {
            let start = groups.last().map_or(0, |group: &RowGroup| group.start + group.len);
            groups.push(RowGroup { start, len: *len, adapter });
        }
        let all = hidden(&fixture.model, &fixture.sequences.concat(), &mask(&lengths), LoraRows::Served(&groups));
        let all = fixture.model.logits(&all).unwrap();
        for (index, group) in groups.iter().enumerate() {
            let rows = all.narrow(0, group.start, group.len).unwrap();
            let key = if group.adapter.is_some() { "adapter" } else { "base" };
            fixture.check(&format!("{key}.{index}"), &rows);
            let alone = [RowGroup { start: 0, ..group.clone() }];
            let alone = logits(&fixture.model, &fixture.sequences[index], LoraRows::Served(&alone));
            assert!(same(&rows, &alone), "{name}: a row's bits depend on what else is in the step");
        }
    }
}

/// The prompt in chunks, then token by token, over blocks that lie in the pool in no order.
#[test]
fn paged_attention_gives_the_same_logits() {
    const BLOCK: usize = 4;
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        let pool = KvPool::new(fixture.model.config(), 8, BLOCK, fixture.model.compute_dtype(), device()).unwrap();
        let ids = &fixture.sequences[1];
        let blocks: Vec<u32> = vec![6, 1, 7, 0, 3];
        assert!(ids.len() <= blocks.len() * BLOCK);
        let mut rows = Vec::new();
        let mut done = 0;
        for len in [7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1] {
            let positions: Vec<u32> = (done..done + len).map(|position| position as u32).collect();
            let slot = |&position: &u32| blocks[position as usize / BLOCK] * BLOCK as u32 + position % BLOCK as u32;
            let sequence = PagedSequence { start: 0, len, context: done + len, blocks: blocks.clone() };
            let batch = PagedBatch::new(BLOCK, positions.iter().map(slot).collect(), vec![sequence]);
            let attend = Attend::Paged { pool: &pool, batch: &batch };
            let ids = &ids[done..done + len];
            let hidden = fixture.model.forward(ids, &positions, attend, LoraRows::Base).unwrap();
            rows.push(fixture.model.logits(&hidden).unwrap());
            done += len;
        }
        assert_eq!(done, ids.len());
        fixture.check("base.1", &Tensor::cat(&rows, 0).unwrap());
    }
}

/// The pairs packed as `[x, y_w, y_l]`, one after the other in one flat step.
struct Packed {
    ids: Vec<u32>,
    mask: CausalMask,
    /// Per pair and side, rows that predict and what they predict.
    answers: Vec<(Vec<u32>, Vec<u32>)>,
}

fn packed(pairs: &Value) -> Packed {
    let mut packed = Packed { ids: vec![], mask: CausalMask::new(vec![], vec![]), answers: vec![] };
    for pair in pairs.as_array().unwrap() {
        let prompt = ids(&pair["prompt"]);
        let start = packed.ids.len();
        let prefix = start..start + prompt.len();
        packed.mask.segments.push(segment(start, prompt.len()));
        packed.mask.positions.extend(0..prompt.len() as u32);
        packed.ids.extend(&prompt);
        for side in ["chosen", "rejected"] {
            let answer = ids(&pair[side]);
            let (start, len) = (packed.ids.len(), answer.len());
            packed.mask.segments.push(Segment { start, len, prefix: prefix.clone() });
            packed.mask.positions.extend((prompt.len()..prompt.len() + len).map(|position| position as u32));
            let rows = std::iter::once(prefix.end - 1).chain(start..start + len - 1);
            packed.answers.push((rows.map(|row| row as u32).collect(), answer.clone()));
            packed.ids.extend(answer);
        }
    }
    packed
}

/// Log-probs of the answers' tokens, answer after answer. hidden: (N, C).
fn answer_logprobs(model: &Decoder, packed: &Packed, hidden: &Tensor) -> Result<Tensor> {
    let targets: Vec<u32> = packed.answers.iter().flat_map(|(_, targets)| targets.clone()).collect();
    token_logprobs(hidden, model.head()?, &targets, &mut || Ok(()))
}

#[test]
fn every_lora_gradient_is_that_of_peft() {
    for name in ARCHITECTURES {
        let fixture = fixture(name);
        let (params, model) = (fixture.params(), &fixture.model);
        let packed = packed(&fixture.expected["pairs"]);
        let run = |lora: LoraRows<'_>| hidden(model, &packed.ids, &packed.mask, lora);
        let rows: Vec<u32> = packed.answers.iter().flat_map(|(rows, _)| rows.clone()).collect();
        let rows = Tensor::from_slice(&rows, rows.len(), model.device()).unwrap();
        let picked = run(LoraRows::Base).index_select(&rows, 0).unwrap();
        let reference = answer_logprobs(model, &packed, &picked).unwrap();

        let variables = params.named();
        let leaves = variables.iter().map(|(_, variable)| variable.as_tensor());
        let of_policy = || Ok(run(LoraRows::Train { params: &params, dropout_seed: None }));
        let (body, of_body) = record(leaves, of_policy).unwrap();
        let picked = body.index_select(&rows, 0).unwrap();
        let (policy, of_head) = record([&picked], || answer_logprobs(model, &packed, &picked)).unwrap();

        // Summed over each answer; then −ln σ(β·h) a pair, averaged, and its slope in each token's log-prob.
        let sums = |logprobs: &Tensor| -> Vec<f64> {
            let mut logprobs = logprobs.to_vec1::<f32>().unwrap().into_iter();
            let of = |(_, targets): &(Vec<u32>, Vec<u32>)| logprobs.by_ref().take(targets.len()).map(f64::from).sum();
            packed.answers.iter().map(of).collect()
        };
        let beta = fixture.expected["beta"].as_f64().unwrap();
        let (policy_sums, reference_sums) = (sums(&policy), sums(&reference));
        let pairs = policy_sums.len() as f64 / 2.0;
        let (mut loss, mut slopes) = (0.0, Vec::new());
        for (index, (policy, reference)) in policy_sums.chunks(2).zip(reference_sums.chunks(2)).enumerate() {
            let h = beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]));
            loss += (-h).exp().ln_1p() / pairs;
            let slope = -beta / (1.0 + h.exp()) / pairs;
            for (side, sign) in [(0, 1.0), (1, -1.0)] {
                slopes.extend(vec![(sign * slope) as f32; packed.answers[2 * index + side].1.len()]);
            }
        }
        let wanted = fixture.expected["dpo_loss"].as_f64().unwrap();
        let most = tolerance(1e-5, 0.05);
        assert!((loss - wanted).abs() < f64::from(most), "{name}: loss {loss}, PEFT {wanted}");

        let slopes = Tensor::from_vec(slopes, policy.shape(), model.device()).unwrap();
        let back = of_head.backward([(&policy, slopes)]).unwrap().remove(&picked).unwrap();
        let back = body.zeros_like().unwrap().index_add(&rows, &back, 0).unwrap();
        let gradients = of_body.backward([(&body, back)]).unwrap();
        assert_eq!(variables.len(), fixture.model.config().num_hidden_layers * SITES.len() * 2);
        for (tensor, variable) in variables {
            let got = gradients.get(variable.as_tensor()).unwrap_or_else(|| panic!("{name} {tensor}: no gradient"));
            let wanted = &fixture.tensors[&format!("grad.{tensor}")];
            let most = GRADIENT_TOLERANCE * largest(wanted);
            let (gap, most) = off_by(got, wanted, [most, GRADIENT_TOLERANCE_BF16]);
            assert!(gap < most, "{name} {tensor}: off by {gap} of {most}");
        }
    }
}

#[test]
fn classifier_scores_are_those_of_transformers() {
    for name in CLASSIFIERS {
        let model = load(name, dtype());
        let (expected, sequences) = expected(name);
        let scores = sequences.iter().map(|ids| {
            let hidden = hidden(&model, ids, &mask(&[ids.len()]), LoraRows::Base);
            *model.scores(&hidden).unwrap().last().unwrap()
        });
        let got = Tensor::new(scores.collect::<Vec<f32>>(), &Device::Cpu).unwrap();
        let wanted: Vec<f32> = serde_json::from_value(expected["scores"].clone()).unwrap();
        let (gap, most) = logits_off_by(&got, &Tensor::new(wanted, &Device::Cpu).unwrap());
        assert!(gap < most, "{name}: {got}: off by {gap}");
        assert_eq!(model.head().err().unwrap().status(), 422);
    }
    let language = load("llama", DType::F32);
    let hidden = hidden(&language, &[5], &mask(&[1]), LoraRows::Base);
    assert_eq!(language.scores(&hidden).unwrap_err().status(), 422);
}

#[test]
fn narrow_weights_halve_the_memory_and_stay_near() {
    let ids = fixture("llama").sequences.remove(1);
    let full = load("llama", DType::F32);
    for dtype in [DType::BF16, DType::F16] {
        let narrow = load("llama", dtype);
        let share = narrow.bytes() as f64 / full.bytes() as f64;
        assert!((0.49..0.53).contains(&share), "{dtype:?}: {share}");
        let gap = largest_gap(&logits(&narrow, &ids, LoraRows::Base), &logits(&full, &ids, LoraRows::Base));
        assert!(gap > 0.0 && gap < 0.5, "{dtype:?}: {gap}");
    }
    let checkpoint = Checkpoint::open(&folder("llama")).unwrap();
    let error =
        Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(DType::U8) })
            .err()
            .unwrap();
    assert_eq!(error.param.unwrap(), "dtype");
}

#[test]
fn a_fresh_adapter_is_the_base_and_depends_on_its_seed_alone() {
    let fixture = fixture("llama");
    let fresh = |seed| LoraParams::new(&fixture.adapter.config, &fixture.model, seed).unwrap();
    let tensors = |params: &LoraParams| -> Vec<(String, Vec<u32>)> {
        params.named().iter().map(|(name, variable)| (name.clone(), bits(variable.as_tensor()))).collect()
    };
    let params = fresh(7);
    assert!(tensors(&params) == tensors(&fresh(7)));
    assert!(tensors(&params) != tensors(&fresh(8)));
    let base = logits(&fixture.model, &fixture.sequences[1], LoraRows::Base);
    let lora = LoraRows::Train { params: &params, dropout_seed: None };
    assert!(bits(&base) == bits(&logits(&fixture.model, &fixture.sequences[1], lora)));

    let mut seen = 0f32;
    for (a, b) in params.sites.values() {
        let bound = 1.0 / (a.dims()[1] as f32).sqrt();
        let largest = flat(a.as_tensor()).into_iter().fold(0f32, |largest, value| largest.max(value.abs()));
        assert!(largest <= bound);
        seen = seen.max(largest / bound);
        assert!(flat(b.as_tensor()).iter().all(|&value| value == 0.0));
    }
    assert!(seen > 0.95);

    // A site starts from the same values whatever else is trained.
    let few = LoraConfig { target_modules: vec!["v_proj".into()], ..fixture.adapter.config.clone() };
    let few = LoraParams::new(&few, &fixture.model, 7).unwrap();
    assert_eq!(few.sites.len(), 2);
    for (place, (a, _)) in &few.sites {
        assert!(bits(a.as_tensor()) == bits(params.sites[place].0.as_tensor()));
    }
    let wrong = LoraConfig { target_modules: vec!["c_attn".into()], ..fixture.adapter.config.clone() };
    let error = LoraParams::new(&wrong, &fixture.model, 7).err().unwrap();
    assert_eq!(error.param.as_deref(), Some("lora.target_modules"));
    assert!(error.message.contains("c_attn"));
}

#[test]
fn dropout_is_a_function_of_its_seed() {
    let mut fixture = fixture("llama");
    fixture.adapter.config.lora_dropout = 0.5;
    let params = fixture.params();
    let run = |dropout_seed| {
        bits(&logits(&fixture.model, &fixture.sequences[1], LoraRows::Train { params: &params, dropout_seed }))
    };
    assert!(run(Some(1)) == run(Some(1)));
    assert!(run(Some(1)) != run(Some(2)));
    assert!(run(Some(1)) != run(None));
}

#[test]
fn published_adapters_do_not_move_with_training() {
    let fixture = fixture("qwen3");
    let params = fixture.params();
    let file = params.to_file().unwrap();
    let published = [RowGroup { start: 0, len: 5, adapter: Some(fixture.published()) }];
    let run = || bits(&logits(&fixture.model, &fixture.sequences[0], LoraRows::Served(&published)));
    let before = run();
    for (_, variable) in params.named() {
        variable.set(&variable.as_tensor().ones_like().unwrap()).unwrap();
    }
    assert!(run() == before);
    for (name, tensor) in &file.tensors {
        assert!(bits(tensor) == bits(&fixture.adapter.tensors[name]), "{name}");
    }
    assert_eq!(file.tensors.len(), fixture.adapter.tensors.len());
}

#[test]
fn adapters_that_do_not_fit_name_their_tensor() {
    let fixture = fixture("llama");
    let name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
    let refused = |change: &dyn Fn(&mut AdapterFile)| {
        let mut file = fixture.adapter.clone();
        change(&mut file);
        let error = Adapter::from_file(&file, &fixture.model).err().unwrap();
        assert_eq!(error.status(), 422);
        assert_eq!(LoraParams::from_file(&file, &fixture.model).err(), Some(error.clone()));
        error.param.unwrap()
    };
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let insert = |name: &str, tensor: Tensor| {
        let name = name.to_string();
        move |file: &mut AdapterFile| {
            file.tensors.insert(name.clone(), tensor.clone());
        }
    };
    assert_eq!(refused(&insert(name, zeros((17, 4)))), name);
    assert_eq!(refused(&insert(name, zeros((16, 8)))), name);
    assert_eq!(refused(&insert(name, (zeros((16, 4)).log().unwrap() * 0.0).unwrap())), name);
    assert_eq!(refused(&insert(name, zeros((16, 4)).log().unwrap())), name);
    let a = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight";
    assert_eq!(refused(&|file| drop(file.tensors.remove(name))), a);
    assert_eq!(refused(&|file| drop(file.tensors.remove(a))), name);
    let beyond = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight";
    assert_eq!(refused(&insert(beyond, zeros((16, 4)))), beyond);
    let head = "base_model.model.lm_head.lora_A.weight";
    assert_eq!(refused(&insert(head, zeros((4, 32)))), head);
    assert_eq!(refused(&|file| file.tensors.clear()), "adapter_model.safetensors");
}

#[test]
fn an_id_outside_the_vocabulary_is_refused() {
    assert_eq!(load("gemma3", DType::F32).embed(&[5, 288]).unwrap_err().status(), 400);
}

#[test]
fn incomplete_checkpoints_name_the_tensor() {
    let copy = tempfile::tempdir().unwrap();
    let write_config = |change: &dyn Fn(&mut Value)| {
        let text = std::fs::read(folder("llama").join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        change(&mut config);
        std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    };
    let tensors = candle_core::safetensors::load(folder("llama").join("model.safetensors"), &Device::Cpu).unwrap();
    let refused = |tensors: &HashMap<String, Tensor>| {
        candle_core::safetensors::save(tensors, copy.path().join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(copy.path()).unwrap();
        let error =
            Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(DType::F32) })
                .err()
                .unwrap();
        assert_eq!(error.status(), 422);
        error.param.unwrap()
    };
    write_config(&|_| ());
    let mut fewer = tensors.clone();
    fewer.remove("model.layers.1.mlp.up_proj.weight");
    assert_eq!(refused(&fewer), "model.layers.1.mlp.up_proj.weight");
    write_config(&|config| config["intermediate_size"] = 40.into());
    assert_eq!(refused(&tensors), "model.layers.0.mlp.gate_proj.weight");
    write_config(&|config| config["tie_word_embeddings"] = false.into());
    assert_eq!(refused(&tensors), "lm_head.weight");
}
