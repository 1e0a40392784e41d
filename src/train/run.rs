//! The loop: batches, steps, checkpoints, and what the caller hears of them.

use super::{EvalMetrics, StepMetrics, TrainJob, Trainer};
use crate::error::Result;
use crate::weights::AdapterFile;

/// What the caller hears from a run.
pub trait Hooks {
    /// Between residual blocks, and between pieces of the head.
    fn pace(&mut self) -> Result<()>;
    /// After every optimizer step.
    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()>;
    /// After every evaluation.
    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()>;
    /// After every durable checkpoint; again where a run goes on from one.
    fn on_checkpoint(&mut self, step: usize, adapter: &AdapterFile) -> Result<()>;
}

/// What a run leaves.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained adapter: the last step's, or with `load_best_model_at_end` the best evaluation's.
    pub adapter: AdapterFile,
    /// The step the adapter is of.
    pub adapter_step: usize,
    /// Optimizer steps done.
    pub steps: usize,
    /// Metrics of the last step.
    pub last: Option<StepMetrics>,
    /// Every evaluation.
    pub evaluations: Vec<EvalMetrics>,
    /// Steps that were skipped because they were not finite.
    pub nonfinite_steps: usize,
    /// Pairs dropped for length.
    pub dropped_too_long: usize,
}

/// Runs or resumes a job to its end. An error of a hook (cancel, pause) stops it at once and comes back as it is; the steps done
/// by then are saved, so that a later call goes on from there.
pub fn train(job: &TrainJob<'_>, hooks: &mut dyn Hooks) -> Result<Outcome> {
    let mut trainer = Trainer::open(job)?;
    if let Err(error) = steps(&mut trainer, job.options.checkpoint_steps, hooks) {
        if trainer.saved_step().unwrap_or(0) < trainer.step()
            && let Err(not_saved) = trainer.save_state()
        {
            tracing::warn!(error = %not_saved, "the steps since the last checkpoint are lost");
        }
        return Err(error);
    }
    let (adapter_step, adapter) = match trainer.best_adapter()? {
        Some(best) => best,
        None => (trainer.step(), trainer.adapter()?),
    };
    Ok(Outcome {
        adapter,
        adapter_step,
        evaluations: trainer.evaluations().to_vec(),
        steps: trainer.step(),
        last: trainer.history().last().cloned(),
        nonfinite_steps: trainer.nonfinite_steps(),
        dropped_too_long: trainer.dropped_too_long(),
    })
}

fn steps(trainer: &mut Trainer<'_>, checkpoint_steps: usize, hooks: &mut dyn Hooks) -> Result<()> {
    let total = trainer.total_steps();
    // The last run may have ended between a checkpoint and the word of it. What comes after the last step is the caller's to say.
    let goes_on = |step: usize| step < total && !trainer.should_stop();
    let unheard = trainer.saved_step().filter(|&step| goes_on(step) && step.is_multiple_of(checkpoint_steps));
    if let Some(step) = unheard {
        hooks.on_checkpoint(step, &trainer.adapter()?)?;
    }
    loop {
        if trainer.eval_is_due() {
            let metrics = trainer.evaluate(&mut || hooks.pace())?;
            let heard = hooks.on_eval(&metrics);
            // Now that the device is not held any more.
            trainer.keep_best()?;
            heard?;
        }
        let step = trainer.step();
        let ends = step >= total || trainer.should_stop();
        if step > 0 && trainer.saved_step() != Some(step) && (ends || step.is_multiple_of(checkpoint_steps)) {
            let adapter = trainer.save_state()?;
            hooks.on_checkpoint(step, &adapter)?;
        }
        if ends {
            return trainer.check_finite();
        }
        for batch in trainer.next_batches() {
            trainer.forward_backward(&batch, &mut || hooks.pace())?;
        }
        let stopped = trainer.optim_step(&mut || hooks.pace());
        // A stop that comes in the middle of the step finds it whole, and it is heard of.
        if let Some(metrics) = trainer.history().last().filter(|metrics| metrics.step > step) {
            hooks.on_step(metrics)?;
        }
        stopped?;
    }
}
