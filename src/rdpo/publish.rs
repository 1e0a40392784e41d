//! The last stage: the new adapter goes live, and what served it answers as what trained it.

use serde_json::json;

use super::PublishWhen;
use super::pacing::Pacing;
use super::report::Report;
use super::run::Run;
use crate::error::Result;
use crate::jobs::Status;
use crate::roles::{AdapterFile, Lease, PublishMode, Target};
use crate::telemetry::metrics;
use crate::train::{Hooks, Outcome, TokenPair, adapter_logprobs};

/// Pairs of the probe batch.
const PROBE: usize = 4;

/// How far apart trainer and server are, nats a token. In bf16 the largest is a matter of luck: one logit of 8 to 16 that is rounded the
/// other way is 0.06 off.
struct Gap {
    largest: f64,
    mean: f64,
}

impl Run<'_> {
    /// Makes the adapter live, if the request wants it and the report allows it.
    pub(super) fn publish(&self, outcome: &Outcome, report: &Report, pairs: &[TokenPair]) -> Result<()> {
        self.context.stage(Status::Publishing)?;
        let publish = &self.request.publish;
        let least = publish.require.win_rate;
        let held_back = match report.win_rate {
            _ if publish.when == PublishWhen::Never => Some("the request says `never`".to_owned()),
            Some(rate) if rate < least => Some(format!("the win rate {rate:.3} is below the required {least}")),
            None if least > 0.0 => {
                Some(format!("no held-out prompt was scored, and a win rate of {least} is required"))
            }
            _ => None,
        };
        // Before it goes live: one that cannot answer never does.
        let staged = self.stage(&outcome.adapter)?;
        let gap = self.probe(pairs, outcome, &staged)?;
        let lease = match &held_back {
            Some(reason) => {
                self.context.event("warn", "message", &format!("not published: {reason}"), &json!({}))?;
                staged
            }
            None => self.roles.adapters().publish(&publish.alias, &outcome.adapter, PublishMode::Upsert)?,
        };
        metrics().train_serve_logprob_gap.set(gap.largest);
        let version = held_back.is_none().then_some(lease.version);
        let result = json!({"adapter": {
            "alias": publish.alias, "version": version, "generation": lease.adapter.generation,
            "published": held_back.is_none(), "reason": held_back,
            "train_serve_logprob_gap": gap.largest, "train_serve_logprob_gap_mean": gap.mean,
        }});
        self.set_result(&result)?;
        if let Some(version) = version {
            let message = format!("adapter `{}` version {version} is live", publish.alias);
            self.context.event("info", "message", &message, &result)?;
        }
        Ok(())
    }

    /// A copy of an adapter that answers but is not live; an error where it answers with what are no numbers.
    pub(super) fn stage(&self, adapter: &AdapterFile) -> Result<Lease> {
        let lease = self.roles.adapters().stage(&self.request.publish.alias, adapter)?;
        let staged = Target { lease: Some(lease.clone()), ..self.roles.student_base()? };
        // Any two tokens do.
        self.runtime.block_on(staged.logprobs_of(&[0], &[1]))?;
        Ok(lease)
    }

    /// Whether all was done, but for the last word of it, when an earlier run of the job ended.
    pub(super) fn is_done(&self) -> bool {
        self.context.job.result["adapter"].is_object()
    }

    /// Removes what the run needed to be resumed, once nothing of it is left to do; a published adapter is under its alias.
    pub(super) fn clear(&self) -> Result<()> {
        let folder = self.roles.adapters().job_folder(&self.context.job.id);
        let result = self.context.store.get(&self.context.job.id)?.result;
        if result["adapter"]["published"] == true
            && folder.exists()
            && let Err(error) = std::fs::remove_dir_all(&folder)
        {
            tracing::warn!(%error, "{} stays behind", folder.display());
        }
        Ok(())
    }

    /// The gap between the trainer's and the server's log-probs of the first pairs' chosen answers.
    fn probe(&self, pairs: &[TokenPair], outcome: &Outcome, lease: &Lease) -> Result<Gap> {
        let base = self.roles.student_base()?;
        let served = Target { lease: Some(lease.clone()), ..base.clone() };
        let (model, longest) = (base.engine()?.model(), base.engine()?.max_model_len());
        let gate = base.engine()?.gate();
        let (mut largest, mut sum, mut tokens): (f64, f64, usize) = (0.0, 0.0, 0);
        let fitting = pairs.iter().filter(|pair| pair.prompt.len() + pair.chosen.len() < longest);
        let probed: Vec<&TokenPair> = fitting.take(PROBE).collect();
        // In turns with serving, as training is.
        let trained: Vec<Vec<f32>> = gate.training(|| {
            let mut pacing = Pacing::new(self, &gate);
            let mut of = |pair: &&TokenPair| {
                adapter_logprobs(model, &outcome.adapter, &pair.prompt, &pair.chosen, &mut || pacing.pace())
            };
            probed.iter().map(&mut of).collect::<Result<_>>()
        })?;
        for (pair, trained) in probed.iter().zip(&trained) {
            self.context.check()?;
            let answered = self.runtime.block_on(served.logprobs_of(&pair.prompt, &pair.chosen))?;
            for (one, other) in trained.iter().zip(&answered) {
                let gap = f64::from((one - other).abs());
                (largest, sum, tokens) = (largest.max(gap), sum + gap, tokens + 1);
            }
        }
        Ok(Gap { largest, mean: sum / tokens.max(1) as f64 })
    }
}
