//! The loop: batches, steps, checkpoints, and what the caller hears of them.

use super::{StepMetrics, TrainJob, Trainer};
use crate::error::Result;
use crate::weights::AdapterFile;

/// What the caller hears from a run.
pub trait Hooks {
    /// Between layers.
    fn pace(&mut self) -> Result<()>;
    /// After every optimizer step.
    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()>;
    /// After every durable checkpoint.
    fn on_checkpoint(&mut self, step: usize, adapter: &AdapterFile) -> Result<()>;
}

/// What a run leaves.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained adapter.
    pub adapter: AdapterFile,
    /// Optimizer steps done.
    pub steps: usize,
    /// Metrics of the last step.
    pub last: Option<StepMetrics>,
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
    Ok(Outcome {
        adapter: trainer.adapter()?,
        steps: trainer.step(),
        last: trainer.history().last().cloned(),
        dropped_too_long: trainer.dropped_too_long(),
    })
}

fn steps(trainer: &mut Trainer<'_>, checkpoint_steps: usize, hooks: &mut dyn Hooks) -> Result<()> {
    let total = trainer.total_steps();
    while trainer.step() < total {
        for batch in trainer.next_batches() {
            trainer.forward_backward(&batch, &mut || hooks.pace())?;
        }
        trainer.optim_step()?;
        if let Some(metrics) = trainer.history().last() {
            hooks.on_step(metrics)?;
        }
        if trainer.step() == total || trainer.step().is_multiple_of(checkpoint_steps) {
            let adapter = trainer.save_state()?;
            hooks.on_checkpoint(trainer.step(), &adapter)?;
        }
    }
    Ok(())
}
