//! Evaluations on held-out pairs during training: their values, the best of them, the early end; LoRA+ and ranks by pattern.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;

use rdpo::model::Adapter;
use rdpo::train::{BestMetric, LoraOptions, TokenPair, TrainJob, Trainer, TrainingOptions, train};
use tempfile::TempDir;

use super::training::{Listener, job, model, no_pace, pairs, values};

/// The same answers with their places changed: what training makes better on a pair it makes worse on this.
fn turned(pairs: &[TokenPair]) -> Vec<TokenPair> {
    let turn =
        |pair: &TokenPair| TokenPair { chosen: pair.rejected.clone(), rejected: pair.chosen.clone(), ..pair.clone() };
    pairs.iter().map(turn).collect()
}

fn options(job: &TrainJob<'_>) -> TrainingOptions {
    TrainingOptions { epochs: 4.0, eval_steps: Some(2), ..job.options.clone() }
}

#[test]
fn evaluations_say_what_a_training_pass_over_the_same_pairs_says() {
    let (model, pairs, folder) = (model(), pairs(8), TempDir::new().unwrap());
    let mut job = job(&model, &pairs, folder.path());
    job.eval_pairs = &pairs;
    let mut trainer = Trainer::open(&job).unwrap();
    let before = trainer.evaluate(&mut no_pace).unwrap();
    assert_eq!((before.eval_loss, before.rewards_accuracies, before.eval_pairs), (LN_2, 0.0, 8));
    for _ in 0..6 {
        trainer.forward_backward(&[0, 1, 2, 3, 4, 5, 6, 7], &mut no_pace).unwrap();
        trainer.optim_step(&mut no_pace).unwrap();
    }
    let after = trainer.evaluate(&mut no_pace).unwrap();
    let pass = trainer.forward_backward(&[0, 1, 2, 3, 4, 5, 6, 7], &mut no_pace).unwrap();
    assert!((after.eval_loss - pass.loss).abs() < 1e-9, "{} is not {}", after.eval_loss, pass.loss);
    assert_eq!(after.rewards_accuracies, pass.rewards_accuracies);
    assert!(after.best && after.rewards_accuracies > 0.9 && after.eval_loss < LN_2);
}

#[test]
fn the_best_adapter_is_given_and_a_falling_win_rate_ends_the_run() {
    let (model, pairs) = (model(), pairs(8));
    let opposite = turned(&pairs);
    let straight_folder = TempDir::new().unwrap();
    let mut falling = job(&model, &pairs, straight_folder.path());
    falling.eval_pairs = &opposite;
    falling.options = TrainingOptions {
        early_stopping_patience: Some(2),
        load_best_model_at_end: true,
        metric_for_best_model: BestMetric::Loss,
        ..options(&falling)
    };
    let mut heard = Listener::default();
    let outcome = train(&falling, &mut heard).unwrap();
    let steps: Vec<usize> = heard.evaluations.iter().map(|one| one.step).collect();
    assert_eq!((steps.as_slice(), outcome.steps), ([2, 4, 6].as_slice(), 6), "two worse ones after the first");
    assert_eq!(outcome.adapter_step, 2);

    // The adapter given is that of a run which ended there.
    let folder = TempDir::new().unwrap();
    let mut short = job(&model, &pairs, folder.path());
    short.options = TrainingOptions { max_steps: Some(2), epochs: 4.0, ..short.options.clone() };
    let expected = train(&short, &mut Listener::default()).unwrap();
    assert!(values(&outcome.adapter) == values(&expected.adapter));

    // Stopped in the middle and resumed: the same evaluations and the same adapter.
    let folder = TempDir::new().unwrap();
    let resumed_job = TrainJob {
        folder: folder.path().to_path_buf(),
        eval_pairs: &opposite,
        options: falling.options.clone(),
        ..job(&model, &pairs, folder.path())
    };
    let mut first = Listener { stop_at_pace: Some(heard.paced * 3 / 5), ..Listener::default() };
    assert!(train(&resumed_job, &mut first).is_err());
    let resumed = train(&resumed_job, &mut Listener::default()).unwrap();
    assert_eq!(resumed.evaluations, outcome.evaluations);
    assert!(values(&resumed.adapter) == values(&outcome.adapter));
}

#[test]
fn a_best_adapter_that_could_not_be_written_is_written_when_the_run_goes_on() {
    let (model, pairs) = (model(), pairs(8));
    let run = |folder: &TempDir| {
        let mut job = job(&model, &pairs, folder.path());
        job.eval_pairs = &pairs;
        job.options = TrainingOptions { load_best_model_at_end: true, max_steps: Some(4), ..options(&job) };
        train(&job, &mut Listener::default())
    };
    let (clear, blocked) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let expected = run(&clear).unwrap();
    // A file where the folder of the best adapter belongs.
    let in_the_way = blocked.path().join(format!("best-{:08}", expected.adapter_step));
    std::fs::write(&in_the_way, "").unwrap();
    run(&blocked).unwrap_err();
    std::fs::remove_file(&in_the_way).unwrap();
    let resumed = run(&blocked).unwrap();
    assert_eq!(resumed.evaluations, expected.evaluations);
    assert!(values(&resumed.adapter) == values(&expected.adapter));
}

#[test]
fn lora_plus_moves_b_by_its_ratio() {
    let (model, pairs) = (model(), pairs(6));
    let largest = |ratio: Option<f64>| {
        let folder = TempDir::new().unwrap();
        let mut job = job(&model, &pairs, folder.path());
        job.options.loraplus_lr_ratio = ratio;
        let mut trainer = Trainer::open(&job).unwrap();
        trainer.forward_backward(&[0, 1, 2, 3, 4, 5], &mut no_pace).unwrap();
        trainer.optim_step(&mut no_pace).unwrap();
        let adapter = trainer.adapter().unwrap();
        let of_b = adapter.tensors.iter().filter(|(name, _)| name.ends_with("lora_B.weight"));
        of_b.map(|(_, b)| b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()).fold(0.0, f32::max)
    };
    // AdamW's first update is the learning rate, whatever the gradient's size.
    assert!((largest(None) - 5e-3).abs() < 1e-5);
    assert!((largest(Some(16.0)) - 16.0 * 5e-3).abs() < 1e-4);
}

#[test]
fn ranks_and_alphas_by_pattern_shape_the_adapter() {
    let (model, pairs, folder) = (model(), pairs(4), TempDir::new().unwrap());
    let mut job = job(&model, &pairs, folder.path());
    let lora = LoraOptions {
        r: 4,
        alpha: 8.0,
        rank_pattern: BTreeMap::from([("gate_proj".to_owned(), 2), ("layers.1.self_attn.q_proj".to_owned(), 7)]),
        alpha_pattern: BTreeMap::from([("gate_proj".to_owned(), 2.0)]),
        ..LoraOptions::default()
    };
    job.lora = lora.config(None);
    job.options.max_steps = Some(1);
    let adapter = train(&job, &mut Listener::default()).unwrap().adapter;
    let rank = |path: &str| adapter.tensors[&format!("base_model.model.model.layers.{path}.lora_A.weight")].dims()[0];
    assert_eq!((rank("0.mlp.gate_proj"), rank("1.self_attn.q_proj"), rank("0.self_attn.q_proj")), (2, 7, 4));
    assert_eq!(adapter.config.rank_and_scale("model.layers.0.mlp.gate_proj"), (2, 1.0));

    // Made for a Gemma 3 that also sees: a pattern is of the names that model has.
    let mut deeper = adapter.clone();
    let deep = |(name, tensor): (String, _)| (name.replace(".layers.", ".language_model.layers."), tensor);
    deeper.tensors = deeper.tensors.into_iter().map(deep).collect();
    deeper.config.rank_pattern =
        BTreeMap::from([("gate_proj".to_owned(), 2), (".*language_model.layers.1.self_attn.q_proj".to_owned(), 7)]);
    let loaded = Adapter::from_file(&deeper, &model).unwrap();
    assert_eq!(loaded.sites.len(), adapter.tensors.len() / 2);
}
