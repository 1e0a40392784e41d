//! Training of a job between the steps of serving: it holds the device for a slice at a time, and says how it goes.

use serde_json::json;

use super::PublishWhen;
use super::run::Run;
use crate::error::Result;
use crate::jobs::Status;
use crate::roles::{AdapterFile, Gate, GateGuard, PublishMode};
use crate::train::{EvalMetrics, Hooks, StepMetrics};

/// Holds the device for one slice at a time and passes on what the trainer says.
pub(super) struct Pacing<'a, 'r> {
    run: &'a Run<'r>,
    gate: &'a Gate,
    guard: Option<GateGuard<'a>>,
}

impl<'a, 'r> Pacing<'a, 'r> {
    pub(super) fn new(run: &'a Run<'r>, gate: &'a Gate) -> Self {
        Pacing { run, gate, guard: None }
    }
}

impl Hooks for Pacing<'_, '_> {
    fn pace(&mut self) -> Result<()> {
        self.guard = None;
        self.run.context.check()?;
        self.guard = Some(self.gate.train());
        Ok(())
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.guard = None;
        let message = format!("step {}/{}: loss {:.4}", metrics.step, metrics.total_steps, metrics.loss);
        self.run.context.event("info", "metrics", &message, &serde_json::to_value(metrics)?)?;
        self.run.context.progress(Status::Training, metrics.step, metrics.total_steps)
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.guard = None;
        let message = format!(
            "evaluation after step {}: loss {:.4}, accuracy {:.3}{}",
            metrics.step,
            metrics.eval_loss,
            metrics.rewards_accuracies,
            if metrics.best { ", the best so far" } else { "" }
        );
        self.run.context.event("info", "metrics", &message, &serde_json::to_value(metrics)?)
    }

    fn on_checkpoint(&mut self, step: usize, adapter: &AdapterFile) -> Result<()> {
        self.guard = None;
        let publish = &self.run.request.publish;
        if publish.when == PublishWhen::EveryCheckpoint {
            self.run.stage(adapter)?;
            let lease = self.run.roles.adapters().publish(&publish.alias, adapter, PublishMode::Upsert)?;
            let message = format!("adapter `{}` version {} is live (step {step})", publish.alias, lease.version);
            self.run.context.event("info", "message", &message, &json!({"step": step, "version": lease.version}))?;
        }
        Ok(())
    }
}
