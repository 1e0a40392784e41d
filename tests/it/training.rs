//! Training on a tiny random model: anchors, exactness of resume, packing, recompute and accumulation, and bad input.

use std::collections::HashMap;
use std::f64::consts::LN_2;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdpo::error::{Code, Error, Result};
use rdpo::model::{Decoder, LoadOptions, LoraRows, WeightFormat};
use rdpo::train::{
    EvalMetrics, Hooks, LoraOptions, LossKind, LossOptions, Scheduler, StepMetrics, TokenPair, TrainJob, Trainer,
    TrainingOptions, token_logprobs_of, train,
};
use rdpo::weights::{AdapterFile, Checkpoint};
use tempfile::TempDir;

const VOCABULARY: u32 = 96;
const HIDDEN: usize = 48;
const INNER: usize = 80;
const LAYERS: usize = 3;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 12;

/// A Llama of random weights, large enough that its log-probs differ from token to token.
pub(crate) fn model() -> Decoder {
    model_in(DType::F32, 7)
}

/// The same held in another dtype, or drawn by another seed.
fn model_in(dtype: DType, seed: u64) -> Decoder {
    let folder = TempDir::new().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 256, "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "float32",
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize], scale: f32, shift: f32| {
        let data: Vec<f32> =
            (0..shape.iter().product()).map(|_| shift + scale * rng.random_range(-1.0f32..1.0)).collect();
        tensors.insert(name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[VOCABULARY as usize, HIDDEN], 0.5, 0.0);
    put("model.norm.weight".into(), &[HIDDEN], 0.2, 1.0);
    for layer in 0..LAYERS {
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        put(at("input_layernorm"), &[HIDDEN], 0.2, 1.0);
        put(at("post_attention_layernorm"), &[HIDDEN], 0.2, 1.0);
        put(at("self_attn.q_proj"), &[HEADS * HEAD_DIM, HIDDEN], 0.3, 0.0);
        put(at("self_attn.k_proj"), &[KV_HEADS * HEAD_DIM, HIDDEN], 0.3, 0.0);
        put(at("self_attn.v_proj"), &[KV_HEADS * HEAD_DIM, HIDDEN], 0.3, 0.0);
        put(at("self_attn.o_proj"), &[HIDDEN, HEADS * HEAD_DIM], 0.3, 0.0);
        put(at("mlp.gate_proj"), &[INNER, HIDDEN], 0.3, 0.0);
        put(at("mlp.up_proj"), &[INNER, HIDDEN], 0.3, 0.0);
        put(at("mlp.down_proj"), &[HIDDEN, INNER], 0.3, 0.0);
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(dtype) }).unwrap()
}

pub(crate) fn pairs(count: usize) -> Vec<TokenPair> {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut ids = |from: usize, to: usize| {
        let len = rng.random_range(from..to);
        (0..len).map(|_| rng.random_range(0..VOCABULARY)).collect::<Vec<u32>>()
    };
    (0..count)
        .map(|index| TokenPair {
            prompt: ids(3, 17),
            chosen: ids(1, 13),
            rejected: ids(1, 13),
            reference_rejected: None,
            score_chosen: 1.0 + index as f64 * 0.25,
            score_rejected: 1.5,
        })
        .collect()
}

pub(crate) fn job<'a>(model: &'a Decoder, pairs: &'a [TokenPair], folder: &Path) -> TrainJob<'a> {
    TrainJob {
        model,
        lora: LoraOptions { r: 4, alpha: 8.0, ..Default::default() }.config(Some("tiny")),
        init: None,
        pairs,
        eval_pairs: &[],
        loss: LossOptions { kind: LossKind::Dpo, ..Default::default() },
        options: TrainingOptions {
            batch_size: 4,
            learning_rate: 5e-3,
            scheduler: Scheduler::Constant,
            warmup_ratio: 0.0,
            ..Default::default()
        },
        seed: 3,
        folder: folder.to_path_buf(),
    }
}

pub(crate) fn no_pace() -> Result<()> {
    Ok(())
}

/// Hears everything; stops the run at the `stop_at`-th call of pace, or at a step.
#[derive(Default)]
pub(crate) struct Listener {
    pub(crate) steps: Vec<StepMetrics>,
    pub(crate) evaluations: Vec<EvalMetrics>,
    pub(crate) checkpoints: Vec<usize>,
    pub(crate) paced: usize,
    pub(crate) paced_by_step: Vec<usize>,
    pub(crate) stop_at_pace: Option<usize>,
    pub(crate) stop_at_step: Option<usize>,
}

impl Hooks for Listener {
    fn pace(&mut self) -> Result<()> {
        self.paced += 1;
        if self.stop_at_pace == Some(self.paced) { Err(Error::cancelled()) } else { Ok(()) }
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.steps.push(metrics.clone());
        self.paced_by_step.push(self.paced);
        if self.stop_at_step == Some(metrics.step) { Err(Error::cancelled()) } else { Ok(()) }
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.evaluations.push(*metrics);
        Ok(())
    }

    fn on_checkpoint(&mut self, step: usize, _adapter: &AdapterFile) -> Result<()> {
        self.checkpoints.push(step);
        Ok(())
    }
}

pub(crate) fn values(adapter: &AdapterFile) -> Vec<(String, Vec<u32>)> {
    let bits =
        |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect();
    adapter.tensors.iter().map(|(name, tensor)| (name.clone(), bits(tensor))).collect()
}

fn gradients(trainer: &Trainer<'_>) -> Vec<(String, Vec<f32>)> {
    let gradients = trainer.gradients().unwrap();
    gradients.iter().map(|(name, tensor)| (name.clone(), tensor.flatten_all().unwrap().to_vec1().unwrap())).collect()
}

/// Largest difference as a share of the largest value of the tensor.
fn relative_gap(a: &[(String, Vec<f32>)], b: &[(String, Vec<f32>)]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0f32;
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!(name, other);
        let largest = a.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        let gap = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        worst = worst.max(gap / largest);
    }
    worst
}

/// A trainer a few steps in, so that both A and B have gradients.
fn warmed<'a>(job: &TrainJob<'a>) -> Trainer<'a> {
    let mut trainer = Trainer::open(job).unwrap();
    for _ in 0..2 {
        trainer.forward_backward(&[0, 1, 2, 3, 4, 5], &mut no_pace).unwrap();
        trainer.optim_step(&mut no_pace).unwrap();
    }
    trainer
}

#[test]
fn step_zero_is_exactly_the_reference() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    for kind in [LossKind::Dpo, LossKind::Cdpo] {
        let job = TrainJob { loss: LossOptions { kind, ..Default::default() }, ..job(&model, &pairs, folder.path()) };
        let mut trainer = Trainer::open(&job).unwrap();
        let metrics = trainer.forward_backward(&[0, 1, 2, 3], &mut no_pace).unwrap();
        assert_eq!(metrics.loss, LN_2);
        assert_eq!((metrics.rewards_chosen, metrics.rewards_rejected, metrics.rewards_margins), (0.0, 0.0, 0.0));
        assert_eq!(metrics.rewards_accuracies, 0.0);
        let pair = &pairs[0];
        let with = trainer.sample_logprobs(&pair.prompt, &pair.chosen, true).unwrap();
        assert_eq!(with, trainer.sample_logprobs(&pair.prompt, &pair.chosen, false).unwrap());
        assert_eq!(
            with,
            token_logprobs_of(&model, &pair.prompt, &pair.chosen, LoraRows::Base, &mut || Ok(())).unwrap()
        );
        assert_eq!(with.len(), pair.chosen.len());
        assert!(with.iter().all(|&v| v < 0.0));
    }
}

#[test]
fn a_reference_that_the_sampler_left_is_the_one_that_would_be_computed() {
    let (model, pairs) = (model(), pairs(8));
    let trained = |pairs: &[TokenPair]| {
        let folder = TempDir::new().unwrap();
        warmed(&job(&model, pairs, folder.path())).adapter().unwrap().generation().unwrap()
    };
    let sampled = |pair: &TokenPair| {
        let known = token_logprobs_of(&model, &pair.prompt, &pair.rejected, LoraRows::Base, &mut || Ok(())).unwrap();
        TokenPair { reference_rejected: Some(known), ..pair.clone() }
    };
    let mut known: Vec<TokenPair> = pairs.iter().map(sampled).collect();
    assert_eq!(trained(&known), trained(&pairs));
    known[0].reference_rejected.as_mut().unwrap()[0] -= 1.0;
    assert_ne!(trained(&known), trained(&pairs), "it is used");
}

#[test]
fn packed_log_probs_are_those_of_plain_sequences() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    let mut trainer = warmed(&job(&model, &pairs, folder.path()));
    let metrics = trainer.forward_backward(&[1, 6, 2], &mut no_pace).unwrap();
    let sum = |pick: fn(&TokenPair) -> &Vec<u32>| -> f64 {
        let of = |index: usize| -> f64 {
            let values = trainer.sample_logprobs(&pairs[index].prompt, pick(&pairs[index]), true).unwrap();
            values.iter().map(|&v| f64::from(v)).sum()
        };
        (of(1) + of(6) + of(2)) / 3.0
    };
    // Rows do not depend on what else is in the step, so sharing the prompt changes no bit.
    assert_eq!(metrics.logps_chosen, sum(|pair| &pair.chosen));
    assert_eq!(metrics.logps_rejected, sum(|pair| &pair.rejected));
}

#[test]
fn gradients_equal_finite_differences() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    let mut job = job(&model, &pairs, folder.path());
    job.loss = LossOptions { beta: 1.0, ..Default::default() };
    let adapter = warmed(&job).adapter().unwrap();
    let loss_at = |adapter: &AdapterFile| {
        let folder = TempDir::new().unwrap();
        let job = TrainJob {
            init: Some(adapter.clone()),
            folder: folder.path().to_path_buf(),
            lora: job.lora.clone(),
            loss: job.loss.clone(),
            options: job.options.clone(),
            ..job
        };
        let mut trainer = Trainer::open(&job).unwrap();
        let loss = trainer.forward_backward(&[0, 1, 2, 3, 4, 5], &mut no_pace).unwrap().loss;
        (loss, gradients(&trainer))
    };
    let (_, found) = loss_at(&adapter);
    assert_eq!(found.len(), LAYERS * 7 * 2);
    for (name, gradient) in found.iter().step_by(5) {
        let (place, _) = gradient.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap();
        let step = 2e-3;
        let moved = |by: f32| {
            let mut adapter = adapter.clone();
            let tensor = &adapter.tensors[name];
            let mut data = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            data[place] += by;
            let tensor = Tensor::from_vec(data, tensor.shape(), &Device::Cpu).unwrap();
            adapter.tensors.insert(name.clone(), tensor);
            loss_at(&adapter).0
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        let got = f64::from(gradient[place]);
        assert!((got - slope).abs() < 2e-2 * slope.abs() + 1e-3, "{name}[{place}]: {got} against {slope}");
    }
}

#[test]
fn packs_give_the_gradient_of_single_pairs() {
    let (model, pairs) = (model(), pairs(8));
    let (one, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut packed = warmed(&job(&model, &pairs, one.path()));
    let mut single = warmed(&job(&model, &pairs, other.path()));
    let together = packed.forward_backward(&[0, 3, 5, 7], &mut no_pace).unwrap();
    let mut loss = 0.0;
    for index in [0, 3, 5, 7] {
        loss += single.forward_backward(&[index], &mut no_pace).unwrap().loss / 4.0;
    }
    assert!((together.loss - loss).abs() < 1e-12, "{} {loss}", together.loss);
    let gap = relative_gap(&gradients(&packed), &gradients(&single));
    assert!(gap < 1e-5, "{gap}");
}

#[test]
fn recomputed_blocks_give_the_same_bits_as_kept_ones() {
    let (model, pairs) = (model(), pairs(8));
    let run = |memory: &str| {
        let folder = TempDir::new().unwrap();
        let mut job = job(&model, &pairs, folder.path());
        job.lora.lora_dropout = 0.2;
        job.options.activation_memory = memory.into();
        let mut trainer = warmed(&job);
        trainer.forward_backward(&[0, 3, 5, 7], &mut no_pace).unwrap();
        (gradients(&trainer), trainer.kept_blocks())
    };
    let (kept, blocks) = run("1GiB");
    assert_eq!(blocks, 2 * LAYERS);
    let (none_kept, blocks) = run("0");
    assert_eq!(blocks, 0);
    assert!(kept == none_kept);
    // Doubling cannot jump over the sizes that hold what attention gave and no block, nor over those that hold some blocks and not all.
    let runs = (10..30).map(|power| run(&(1u64 << power).to_string()));
    let mut few: Vec<_> = runs.take_while(|(_, blocks)| *blocks < 2 * LAYERS).collect();
    assert!(few.iter().any(|(_, blocks)| *blocks > 0));
    few.retain(|(found, _)| *found != kept);
    assert!(few.is_empty());
}

#[test]
fn accumulation_is_a_larger_batch() {
    let (model, pairs) = (model(), pairs(8));
    let run = |batch_size, gradient_accumulation_steps| {
        let folder = TempDir::new().unwrap();
        let mut job = job(&model, &pairs, folder.path());
        job.options = TrainingOptions { batch_size, gradient_accumulation_steps, ..job.options };
        let mut listener = Listener::default();
        train(&job, &mut listener).unwrap();
        listener.steps
    };
    let (large, small) = (run(4, 1), run(2, 2));
    assert_eq!((large.len(), small.len()), (2, 2));
    for (large, small) in large.iter().zip(&small) {
        assert!((large.loss - small.loss).abs() < 1e-5, "{} {}", large.loss, small.loss);
        assert!((large.grad_norm / small.grad_norm - 1.0).abs() < 1e-4);
        assert_eq!(large.num_tokens, small.num_tokens);
    }
}

/// Ten steps with everything on that draws random numbers or keeps state.
fn long_job<'a>(model: &'a Decoder, pairs: &'a [TokenPair], folder: &Path) -> TrainJob<'a> {
    let mut job = job(model, pairs, folder);
    job.lora.lora_dropout = 0.1;
    job.loss = LossOptions::default();
    job.options = TrainingOptions {
        epochs: 3.3,
        batch_size: 2,
        gradient_accumulation_steps: 2,
        weight_decay: 0.01,
        scheduler: Scheduler::Cosine,
        warmup_ratio: 0.1,
        checkpoint_steps: 4,
        ..job.options
    };
    job
}

#[test]
fn a_resumed_run_ends_in_the_same_bits() {
    let (model, pairs) = (model(), pairs(10));
    let straight_folder = TempDir::new().unwrap();
    let mut listener = Listener::default();
    let straight = train(&long_job(&model, &pairs, straight_folder.path()), &mut listener).unwrap();
    assert_eq!((straight.steps, listener.steps.len()), (10, 10), "ceil(3.3 epochs · 3 steps)");
    assert_eq!(listener.checkpoints, [4, 8, 10]);
    let paces_per_step = listener.paced / 10;

    // Stopped by the caller after a step, in the middle of a layer walk, and as kill -9 would: without any last words.
    let paused = Listener { stop_at_step: Some(6), ..Default::default() };
    let inside = Listener { stop_at_pace: Some(6 * paces_per_step + paces_per_step / 2), ..Default::default() };
    for mut first in [paused, inside] {
        let folder = TempDir::new().unwrap();
        let job = long_job(&model, &pairs, folder.path());
        assert_eq!(train(&job, &mut first).unwrap_err().code, Code::Cancelled);
        let mut second = Listener::default();
        let resumed = train(&job, &mut second).unwrap();
        assert_eq!(first.steps.len() + second.steps.len(), 10, "no step is done twice or lost");
        assert!(values(&resumed.adapter) == values(&straight.adapter));
        assert_eq!(resumed.last.unwrap().num_tokens, straight.last.as_ref().unwrap().num_tokens);
    }

    let folder = TempDir::new().unwrap();
    let job = long_job(&model, &pairs, folder.path());
    let mut killed = Trainer::open(&job).unwrap();
    for step in 1..=6 {
        for batch in killed.next_batches() {
            killed.forward_backward(&batch, &mut no_pace).unwrap();
        }
        killed.optim_step(&mut no_pace).unwrap();
        if step == 4 {
            killed.save_state().unwrap();
        }
    }
    drop(killed);
    let mut rest = Listener::default();
    let resumed = train(&job, &mut rest).unwrap();
    assert_eq!(rest.steps.first().unwrap().step, 5);
    assert_eq!(rest.checkpoints, [4, 8, 10], "nobody may have heard of the one it was killed behind");
    assert!(values(&resumed.adapter) == values(&straight.adapter));
    let file =
        |folder: &TempDir| std::fs::read(folder.path().join("checkpoint-00000010/adapter_model.safetensors")).unwrap();
    assert!(file(&folder) == file(&straight_folder));

    // A finished run is only read back.
    let mut again = Listener::default();
    let outcome = train(&job, &mut again).unwrap();
    assert!(again.steps.is_empty() && values(&outcome.adapter) == values(&straight.adapter));
}

#[test]
fn a_checkpoint_of_another_job_is_refused() {
    let (model, pairs, folder) = (model(), pairs(4), TempDir::new().unwrap());
    let mut first = job(&model, &pairs, folder.path());
    train(&first, &mut Listener::default()).unwrap();
    first.seed += 1;
    let error = train(&first, &mut Listener::default()).unwrap_err();
    assert_eq!(error.code, Code::Conflict);
    assert!(error.message.contains("checkpoint-00000001"), "{error}");
    first.seed -= 1;
    // The reference it holds is that of these weights in this dtype.
    for other in [model_in(DType::BF16, 7), model_in(DType::F32, 8)] {
        let error = train(&TrainJob { model: &other, ..job(&other, &pairs, folder.path()) }, &mut Listener::default());
        assert_eq!(error.unwrap_err().code, Code::Conflict);
    }
    assert!(train(&job(&model_in(DType::F32, 7), &pairs, folder.path()), &mut Listener::default()).is_ok());
}

/// How often each step of a run paces.
fn paces(job: &TrainJob<'_>, stop_at_step: Option<usize>) -> Vec<usize> {
    let mut listener = Listener { stop_at_step, ..Default::default() };
    assert_eq!(train(job, &mut listener).is_err(), stop_at_step.is_some());
    let starts = std::iter::once(&0).chain(&listener.paced_by_step);
    listener.paced_by_step.iter().zip(starts).map(|(end, start)| end - start).collect()
}

#[test]
fn a_pair_s_reference_is_read_once_a_run_and_the_walk_paces_in_every_block() {
    let (model, pairs) = (model(), pairs(4));
    let job_in = |folder: &Path| {
        let mut job = job(&model, &pairs, folder);
        job.options = TrainingOptions { epochs: 3.0, shuffle: false, ..job.options };
        job
    };
    let (straight, resumed) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let steps = paces(&job_in(straight.path()), None);
    // Two slices a layer, each way, and those of the reference's forward in the first epoch.
    assert!(steps[1] >= 4 * LAYERS && steps[0] >= steps[1] + 2 * LAYERS, "{steps:?}");
    assert_eq!(steps[1], steps[2]);
    assert_eq!(paces(&job_in(resumed.path()), Some(1)), steps[..1]);
    assert_eq!(paces(&job_in(resumed.path()), None), steps[1..], "what was known when it stopped is known");
}

#[test]
fn tokens_saved_are_those_that_were_not_computed() {
    let (model, folder) = (model(), TempDir::new().unwrap());
    let pair = |prompt, chosen, rejected| TokenPair {
        prompt: vec![1; prompt],
        chosen: vec![2; chosen],
        rejected: vec![3; rejected],
        ..pairs(1).remove(0)
    };
    let pairs = [pair(10, 4, 6), pair(5, 1, 2)];
    let outcome = train(&job(&model, &pairs, folder.path()), &mut Listener::default()).unwrap();
    let last = outcome.last.unwrap();
    // As TRL counts: 10 + 4 + 10 + 6 and 5 + 1 + 5 + 2. Computed: 10 + 3 + 5 and 5 + 0 + 1.
    assert_eq!((last.num_tokens, last.tokens_saved), (43, 43 - 24));
}

#[test]
fn a_run_whose_steps_were_not_finite_fails_and_still_does_when_it_goes_on() {
    let (model, pairs) = (model(), pairs(8));
    let begun = TempDir::new().unwrap();
    let mut init = warmed(&job(&model, &pairs, begun.path())).adapter().unwrap();
    for tensor in init.tensors.values_mut() {
        *tensor = (&*tensor * 1e30).unwrap();
    }
    for max_steps in [2, 5, 9] {
        let folder = TempDir::new().unwrap();
        let mut job = TrainJob { init: Some(init.clone()), ..job(&model, &pairs, folder.path()) };
        job.options = TrainingOptions { epochs: 9.0, max_steps: Some(max_steps), ..job.options };
        let mut heard = Listener::default();
        let error = train(&job, &mut heard).unwrap_err();
        assert_eq!((error.code, heard.steps.len()), (Code::Unprocessable, max_steps.min(5)), "{error}");
        assert_eq!(error.param.as_deref(), Some("training.learning_rate"));
        let again = train(&job, &mut Listener::default());
        assert_eq!(again.unwrap_err().code, Code::Unprocessable, "an adapter that nothing was learned in");
    }
}

#[test]
fn training_separates_the_answers() {
    let (model, pairs) = (model(), pairs(8));
    for kind in [
        LossKind::Rdpo,
        LossKind::RdpoSoft,
        LossKind::Dpo,
        LossKind::Cdpo,
        LossKind::Robust,
        LossKind::Ipo,
        LossKind::Hinge,
        LossKind::Sft,
    ] {
        let folder = TempDir::new().unwrap();
        let mut job = job(&model, &pairs, folder.path());
        job.loss.kind = kind;
        job.options = TrainingOptions { epochs: 8.0, batch_size: 8, learning_rate: 1e-2, ..job.options };
        let mut listener = Listener::default();
        train(&job, &mut listener).unwrap();
        let (first, last) = (listener.steps.first().unwrap(), listener.steps.last().unwrap());
        assert!(last.loss < first.loss, "{kind:?}: {} to {}", first.loss, last.loss);
        if kind == LossKind::Sft {
            assert!(last.logps_chosen > first.logps_chosen);
        } else if kind != LossKind::RdpoSoft {
            assert!(last.rewards_margins > 0.0 && last.rewards_accuracies > 0.7, "{kind:?}: {last:?}");
        }
    }
}

#[test]
fn an_adapter_given_out_does_not_move_with_training() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    let mut trainer = warmed(&job(&model, &pairs, folder.path()));
    let given = trainer.adapter().unwrap();
    let before = values(&given);
    trainer.forward_backward(&[0, 1, 2, 3], &mut no_pace).unwrap();
    trainer.optim_step(&mut no_pace).unwrap();
    assert!(values(&given) == before);
    assert!(values(&trainer.adapter().unwrap()) != before);
}

#[test]
fn steps_that_are_not_finite_change_nothing_and_end_the_run() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    let mut job = job(&model, &pairs, folder.path());
    let mut adapter = warmed(&job).adapter().unwrap();
    for tensor in adapter.tensors.values_mut() {
        *tensor = (tensor.ones_like().unwrap() * 1e30).unwrap();
    }
    let before = values(&adapter);
    job.init = Some(adapter);
    job.options.epochs = 10.0;
    let mut listener = Listener::default();
    let error = train(&job, &mut listener).unwrap_err();
    assert_eq!((error.code, error.param.as_deref()), (Code::Unprocessable, Some("training.learning_rate")));
    assert_eq!(listener.steps.len(), 5, "the fifth is heard of, then it is the error");
    let kept = AdapterFile::read(&folder.path().join("checkpoint-00000005")).unwrap();
    assert!(values(&kept) == before);
}

#[test]
fn bad_pairs_name_their_place() {
    let (model, good, folder) = (model(), pairs(2), TempDir::new().unwrap());
    let refused = |change: fn(&mut TokenPair)| {
        let mut pairs = good.clone();
        change(&mut pairs[1]);
        let error = Trainer::open(&job(&model, &pairs, folder.path())).err().unwrap();
        assert_eq!(error.status(), 400);
        error.param.unwrap()
    };
    assert_eq!(refused(|pair| pair.prompt.clear()), "pairs[1].prompt");
    assert_eq!(refused(|pair| pair.chosen.clear()), "pairs[1].chosen");
    assert_eq!(refused(|pair| pair.rejected[0] = VOCABULARY), "pairs[1].rejected");
    assert_eq!(refused(|pair| pair.score_chosen = f64::NAN), "pairs[1]");
    assert_eq!(Trainer::open(&job(&model, &[], folder.path())).err().unwrap().param.unwrap(), "pairs");

    // Prompts of 9 and 5 tokens.
    let mut uneven = good.clone();
    uneven[0].prompt = vec![1; 9];
    uneven[1].prompt = vec![1; 5];
    let with_length = |max_length| {
        let mut short = job(&model, &uneven, folder.path());
        short.options.max_length = max_length;
        Trainer::open(&short).map(|trainer| trainer.dropped_too_long())
    };
    assert_eq!(with_length(10).unwrap(), 0);
    assert_eq!(with_length(9).unwrap(), 1);
    assert_eq!(with_length(5).unwrap_err().param.unwrap(), "training.max_length");
}

/// The ten steps of PyTorch + PEFT that `tests/fixtures/make_curves.py` recorded.
fn follows_pytorch(architecture: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/curves").join(architecture);
    let checkpoint = Checkpoint::open(&root).unwrap();
    let model =
        Decoder::load(&checkpoint, &LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(DType::F32) })
            .unwrap();
    let adapter = AdapterFile::read(&root.join("adapter")).unwrap();
    let curve: serde_json::Value = serde_json::from_slice(&std::fs::read(root.join("curve.json")).unwrap()).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let pairs: Vec<TokenPair> = curve["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| TokenPair {
            prompt: ids(&pair["prompt"]),
            chosen: ids(&pair["chosen"]),
            rejected: ids(&pair["rejected"]),
            reference_rejected: None,
            score_chosen: 0.0,
            score_rejected: 0.0,
        })
        .collect();
    let number = |key: &str| curve["options"][key].as_f64().unwrap();
    let folder = TempDir::new().unwrap();
    let mut job = job(&model, &pairs, folder.path());
    job.lora = adapter.config.clone();
    job.init = Some(adapter);
    job.loss.beta = number("beta");
    job.options = TrainingOptions {
        epochs: number("steps"),
        batch_size: pairs.len(),
        learning_rate: number("learning_rate"),
        weight_decay: number("weight_decay"),
        max_grad_norm: number("max_grad_norm"),
        shuffle: false,
        ..job.options
    };
    let mut listener = Listener::default();
    train(&job, &mut listener).unwrap();
    let wanted = curve["steps"].as_array().unwrap();
    assert_eq!(listener.steps.len(), wanted.len());
    for (got, want) in listener.steps.iter().zip(wanted) {
        for (key, got) in [
            ("loss", got.loss),
            ("grad_norm", got.grad_norm),
            ("rewards/chosen", got.rewards_chosen),
            ("rewards/rejected", got.rewards_rejected),
            ("logps/chosen", got.logps_chosen),
            ("logps/rejected", got.logps_rejected),
        ] {
            let want = want[key].as_f64().unwrap();
            assert!((got - want).abs() <= 1e-3 * want.abs() + 1e-5, "{architecture} {key}: {got}, PyTorch {want}");
        }
    }
}

#[test]
fn llama_follows_pytorch() {
    follows_pytorch("llama");
}

#[test]
fn qwen2_follows_pytorch() {
    follows_pytorch("qwen2");
}

#[test]
fn qwen3_follows_pytorch() {
    follows_pytorch("qwen3");
}

#[test]
fn gemma3_follows_pytorch() {
    follows_pytorch("gemma3");
}
