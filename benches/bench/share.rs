//! What serving and training cost each other on one device: `cargo bench --bench bench -- share-run [DTYPE] [SHARE] [STREAMS]`.
//!
//! Prints the inter-token latency of the streams with and without a training run beside them, and the training speed with and
//! without the streams, through the gate that a job uses.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdpo::engine::{Gate, GateGuard, SamplingParams};
use rdpo::error::{Code, Error, Result};
use rdpo::train::{LoraOptions, LossKind, LossOptions, TokenPair, TrainJob, Trainer, TrainingOptions};

use super::{engine, train};

const MODEL: &str = "models/smollm2-135m-instruct";
/// Of each of the three in turn, so that a slower minute of the machine falls on all of them.
const SECONDS: Duration = Duration::from_secs(8);
const ROUNDS: usize = 4;

/// Trains until told to stop; tokens a second, counted as TRL does, until the last batch that was done.
fn training(trainer: &mut Trainer<'_>, pairs: &[TokenPair], gate: &Gate, stop: &AtomicBool) -> Result<f64> {
    let mut guard: Option<GateGuard<'_>> = None;
    let mut pace = || {
        guard = None;
        if stop.load(Ordering::Relaxed) {
            return Err(Error::cancelled());
        }
        guard = Some(gate.train());
        Ok(())
    };
    let (begin, mut tokens, mut rate) = (Instant::now(), 0, 0.0);
    let mut steps = || loop {
        for batch in trainer.next_batches() {
            trainer.forward_backward(&batch, &mut pace)?;
            let of = |pair: &TokenPair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
            tokens += batch.iter().map(|index| of(&pairs[*index])).sum::<usize>();
            rate = tokens as f64 / begin.elapsed().as_secs_f64();
        }
        trainer.optim_step(&mut pace)?;
    };
    let outcome: Result<()> = steps();
    match outcome {
        Err(error) if error.code != Code::Cancelled => Err(error),
        _ => Ok(rate),
    }
}

/// Runs the measurement with the arguments after `share-run`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let argument = |index: usize, default: &'static str| arguments.get(index).map_or(default, String::as_str);
    let number =
        |text: &str| text.parse::<f64>().map_err(|_| Error::invalid("SHARE", format!("`{text}` is no number")));
    let dtype = argument(0, "auto").parse()?;
    let share = number(argument(1, "0.5"))?;
    let streams = number(argument(2, "4"))? as usize;
    let gate = Arc::new(Gate::on_cores(share));
    let (engine, model) = engine::start_with(Path::new(MODEL), dtype, gate.clone())?;
    let text = include_str!("../../LICENSE");
    let (_, pairs) = train::load(Path::new(MODEL), dtype, text, train::Shape::default())?;
    let folder = tempfile::tempdir()?;
    let mut trainer = Trainer::open(&TrainJob {
        model: &model,
        lora: LoraOptions::default().config(None),
        init: None,
        pairs: &pairs,
        eval_pairs: &[],
        loss: LossOptions { kind: LossKind::Dpo, ..LossOptions::default() },
        options: TrainingOptions {
            epochs: 1e4,
            batch_size: 1,
            gradient_accumulation_steps: 4,
            ..TrainingOptions::default()
        },
        seed: 0,
        folder: folder.path().to_path_buf(),
    })?;
    // The reference pass is no part of the comparison.
    trainer.forward_backward(&(0..pairs.len()).collect::<Vec<_>>(), &mut || Ok(()))?;
    trainer.optim_step(&mut || Ok(()))?;

    let stop = AtomicBool::new(false);
    let params = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let serve = |until: Duration| -> Result<Vec<f64>> {
        let (begin, mut gaps) = (Instant::now(), Vec::new());
        while begin.elapsed() < until {
            let params = SamplingParams { max_tokens: Some(64), ..params.clone() };
            gaps.extend(engine::gaps(&engine, streams, 32, &params)?);
        }
        Ok(gaps)
    };
    serve(Duration::from_secs(1))?;

    // Serving alone, training alone, both.
    let (mut alone, mut beside, mut rates) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..ROUNDS {
        alone.extend(serve(SECONDS)?);
        for serving in [false, true] {
            stop.store(false, Ordering::Relaxed);
            rates[usize::from(serving)].push(std::thread::scope(|threads| {
                let worker = threads.spawn(|| gate.training(|| training(&mut trainer, &pairs, &gate, &stop)));
                let served = if serving { serve(SECONDS) } else { Ok(Vec::new()) };
                if !serving {
                    std::thread::sleep(SECONDS);
                }
                stop.store(true, Ordering::Relaxed);
                beside.extend(served?);
                worker.join().map_err(|_| Error::internal("the training thread panicked"))?
            })?);
        }
    }
    let at = |gaps: &[f64], share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize];
    for (name, gaps) in [("serving alone", &mut alone), ("serving beside training", &mut beside)] {
        gaps.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| at(gaps, share) * 1e3);
        println!("{name:<28} p50 {p50:6.1} ms  p95 {p95:6.1} ms  p99 {p99:6.1} ms");
    }
    println!("p95 with training / without: {:.2}", at(&beside, 0.95) / at(&alone, 0.95));
    let mut kept: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(alone, beside)| beside / alone).collect();
    for values in rates.iter_mut().chain([&mut kept]) {
        values.sort_by(f64::total_cmp);
    }
    println!(
        "training alone {:.0} tok/s, beside {streams} streams {:.0} tok/s: {:.2} ({:.2} to {:.2})",
        at(&rates[0], 0.5),
        at(&rates[1], 0.5),
        at(&kept, 0.5),
        at(&kept, 0.0),
        at(&kept, 1.0)
    );
    Ok(())
}
