//! Evaluation during training: the loss and the rewards on held-out pairs, which of the evaluations was the best, and when to end.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::metrics::{Sums, finite};
use super::options::BestMetric;
use super::pack::{Pack, plan};
use super::pass::logprobs;
use super::trainer::{Pace, Trainer, mean_chosen_tokens, pair_logps, reference_logprobs};
use super::{TrainingOptions, preference_loss};
use crate::error::Result;
use crate::model::LoraRows;
use crate::weights::AdapterFile;

const FOLDER: &str = "best-";

/// One evaluation, under TRL's names when logged. A value that is not finite is `null` in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimizer step it was made after.
    pub step: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Held-out pairs.
    pub eval_pairs: usize,
    /// Mean loss.
    #[serde(with = "finite")]
    pub eval_loss: f64,
    /// β·(log π − log ref) of chosen answers, mean.
    #[serde(rename = "eval_rewards/chosen", with = "finite")]
    pub rewards_chosen: f64,
    /// The same of rejected answers.
    #[serde(rename = "eval_rewards/rejected", with = "finite")]
    pub rewards_rejected: f64,
    /// Share of pairs with chosen over rejected (strictly).
    #[serde(rename = "eval_rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Chosen minus rejected, mean.
    #[serde(rename = "eval_rewards/margins", with = "finite")]
    pub rewards_margins: f64,
    /// Whether it was better than all before it.
    pub best: bool,
}

impl EvalMetrics {
    fn better_than(&self, other: &EvalMetrics, metric: BestMetric) -> bool {
        if self.eval_loss.is_finite() != other.eval_loss.is_finite() {
            return self.eval_loss.is_finite();
        }
        match metric {
            BestMetric::Accuracy => self.rewards_accuracies > other.rewards_accuracies,
            BestMetric::Loss => self.eval_loss < other.eval_loss,
        }
    }
}

/// The best of several evaluations; the first of equal ones.
fn best(evaluations: &[EvalMetrics]) -> Option<&EvalMetrics> {
    evaluations.iter().rfind(|one| one.best)
}

/// Whether the run has gone without a better evaluation for as long as the options allow.
fn patience_is_over(evaluations: &[EvalMetrics], options: &TrainingOptions) -> bool {
    let since = evaluations.iter().rev().take_while(|one| !one.best).count();
    options.early_stopping_patience.is_some_and(|patience| since >= patience)
}

impl Trainer<'_> {
    /// Whether this step wants an evaluation that has not been made.
    pub(super) fn eval_is_due(&self) -> bool {
        let step = self.step();
        let wanted = |every: usize| step.is_multiple_of(every) || step == self.total_steps();
        let made = self.state.evaluations.last().is_some_and(|last| last.step == step);
        step > 0 && !made && !self.held_out.pairs.is_empty() && self.options.eval_steps.is_some_and(wanted)
    }

    /// Loss and rewards on the held-out pairs under the current adapter.
    pub fn evaluate(&mut self, pace: &mut Pace<'_>) -> Result<EvalMetrics> {
        let mut sums = Sums::default();
        let all: Vec<usize> = (0..self.held_out.pairs.len()).collect();
        let mean_tokens = mean_chosen_tokens(&self.held_out.pairs, &all);
        for indices in plan(&self.held_out.pairs, &all, self.pack_rows) {
            let lora = LoraRows::Train { params: &self.params, dropout_seed: None };
            let known = &mut self.state.eval_reference;
            reference_logprobs(self.model, &self.held_out.pairs, &indices, known, pace)?;
            let pack = Pack::new(indices.iter().map(|&index| (index, &self.held_out.pairs[index])));
            let values = logprobs(self.model, &pack, lora, pace)?;
            for pair in &pack.pairs {
                let logps = pair_logps(pair, &values, known, &self.held_out.scaled_gaps, mean_tokens);
                sums.pair(&logps, &preference_loss(&logps, &self.loss));
            }
        }
        let (means, step) = (sums.means(), self.step());
        let mut found = EvalMetrics {
            step,
            epoch: step as f64 / self.steps_per_epoch() as f64,
            eval_pairs: sums.pairs,
            eval_loss: means.loss,
            rewards_chosen: means.rewards_chosen,
            rewards_rejected: means.rewards_rejected,
            rewards_accuracies: means.rewards_accuracies,
            rewards_margins: means.rewards_margins,
            best: false,
        };
        let metric = self.options.metric_for_best_model;
        found.best = best(&self.state.evaluations).is_none_or(|before| found.better_than(before, metric));
        self.state.evaluations.push(found);
        Ok(found)
    }

    /// Every evaluation so far.
    pub fn evaluations(&self) -> &[EvalMetrics] {
        &self.state.evaluations
    }

    /// Whether the evaluations say that going on is of no use.
    pub(super) fn should_stop(&self) -> bool {
        patience_is_over(&self.state.evaluations, &self.options)
    }

    /// The step of the best evaluation and its adapter, where one was kept.
    pub(super) fn best_adapter(&self) -> Result<Option<(usize, AdapterFile)>> {
        let kept = best(&self.state.evaluations).filter(|_| self.options.load_best_model_at_end);
        kept.map(|one| Ok((one.step, AdapterFile::read(&self.best_folder(one.step))?))).transpose()
    }

    fn best_folder(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{FOLDER}{step:08}"))
    }

    /// Writes the adapter of the evaluation just made, where it is the best so far and that is wanted at the end. A run that is killed and
    /// goes on from an older step writes the same again; one that cannot write it evaluates again when it goes on.
    pub(super) fn keep_best(&mut self) -> Result<()> {
        let written = self.write_best();
        if written.is_err() {
            self.state.evaluations.pop();
        }
        written
    }

    fn write_best(&self) -> Result<()> {
        let wanted = self.options.load_best_model_at_end;
        let Some(found) = self.state.evaluations.last().filter(|last| last.best && wanted) else { return Ok(()) };
        let folder = self.best_folder(found.step);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&self.folder)?;
        self.adapter()?.write(&folder)
    }

    /// Removes the adapters of evaluations that are not the best any more. Once the state that says so is on disk: a run that is killed before
    /// goes on from the one that was.
    pub(super) fn forget_former_bests(&self) -> Result<()> {
        let best = best(&self.state.evaluations).map(|one| one.step);
        for former in self.state.evaluations.iter().filter(|one| one.best && Some(one.step) != best) {
            let folder = self.best_folder(former.step);
            if folder.exists() {
                std::fs::remove_dir_all(folder)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn evaluations(accuracies: &[f64]) -> Vec<EvalMetrics> {
        let mut all: Vec<EvalMetrics> = Vec::new();
        for (step, &rewards_accuracies) in accuracies.iter().enumerate() {
            let mut one = EvalMetrics { step, rewards_accuracies, ..EvalMetrics::default() };
            one.best = best(&all).is_none_or(|before| one.better_than(before, BestMetric::Accuracy));
            all.push(one);
        }
        all
    }

    #[test]
    fn the_first_of_equal_evaluations_is_the_best_and_patience_counts_from_it() {
        let options = TrainingOptions { early_stopping_patience: Some(2), ..TrainingOptions::default() };
        let run = evaluations(&[0.5, 0.75, 0.75, 0.25]);
        assert_eq!(best(&run).map(|one| one.step), Some(1));
        assert!(!patience_is_over(&run[..3], &options) && patience_is_over(&run, &options));
        assert!(!patience_is_over(&run, &TrainingOptions::default()));
        assert!(best(&[]).is_none() && !patience_is_over(&[], &options));
    }

    #[test]
    fn an_evaluation_that_is_not_finite_survives_json_and_loses_to_any_other() {
        let broken = EvalMetrics { eval_loss: f64::NAN, rewards_accuracies: 0.9, ..EvalMetrics::default() };
        let back: EvalMetrics = serde_json::from_str(&serde_json::to_string(&broken).unwrap()).unwrap();
        assert!(back.eval_loss.is_nan());
        let sound = EvalMetrics { eval_loss: 3.0, rewards_accuracies: 0.1, ..EvalMetrics::default() };
        for metric in [BestMetric::Accuracy, BestMetric::Loss] {
            assert!(sound.better_than(&back, metric) && !back.better_than(&sound, metric));
        }
    }
}
