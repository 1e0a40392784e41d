//! The states of a job and the moves between them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waiting for the worker.
    Queued,
    /// The teacher answers, criticizes, revises.
    Synthesizing,
    /// The reward model scores both answers.
    Scoring,
    /// The student learns.
    Training,
    /// The report is made.
    Evaluating,
    /// The adapter goes live.
    Publishing,
    /// Done.
    Succeeded,
    /// Ended with an error; rows are kept, it can be resumed.
    Failed,
    /// Ended by the user.
    Cancelled,
    /// Halted by the user, or because a remote role stayed out of reach (`error` says so then); can be resumed.
    Paused,
}

impl Status {
    /// Every state, in the order a job goes through them.
    pub const ALL: [Status; 10] = [
        Status::Queued,
        Status::Synthesizing,
        Status::Scoring,
        Status::Training,
        Status::Evaluating,
        Status::Publishing,
        Status::Succeeded,
        Status::Failed,
        Status::Cancelled,
        Status::Paused,
    ];

    /// Name in the API, the store and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Status::Queued => "queued",
            Status::Synthesizing => "synthesizing",
            Status::Scoring => "scoring",
            Status::Training => "training",
            Status::Evaluating => "evaluating",
            Status::Publishing => "publishing",
            Status::Succeeded => "succeeded",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
            Status::Paused => "paused",
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Status> {
        Status::ALL.into_iter().find(|status| status.name() == name)
    }

    /// Whether nothing more happens without a resume.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Succeeded | Status::Failed | Status::Cancelled | Status::Paused)
    }

    /// Whether the state machine allows `self → next`: stages go forward and may be skipped (a job of ready pairs trains at
    /// once), a live job can end in any way until its adapter goes live, which is not taken back; a paused or failed one can be
    /// queued again, a paused one cancelled.
    pub fn allows(self, next: Status) -> bool {
        match (self, next) {
            (Status::Paused | Status::Failed, Status::Queued) | (Status::Paused, Status::Cancelled) => true,
            (from, _) if from.is_final() => false,
            (Status::Publishing, Status::Cancelled | Status::Paused) => false,
            (_, Status::Failed | Status::Cancelled | Status::Paused) => true,
            (from, to) => (from as u8) < (to as u8),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Status::*;
    use super::*;

    #[test]
    fn names_are_what_serde_writes() {
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.name());
            assert_eq!(Status::from_name(status.name()), Some(status));
        }
    }

    #[test]
    fn moves() {
        assert!(Queued.allows(Synthesizing) && Queued.allows(Training) && Publishing.allows(Succeeded));
        assert!(!Training.allows(Scoring) && !Training.allows(Training) && !Training.allows(Queued));
        assert!(Paused.allows(Queued) && Failed.allows(Queued) && Paused.allows(Cancelled));
        for live in [Queued, Synthesizing, Scoring, Training, Evaluating] {
            assert!(live.allows(Failed) && live.allows(Cancelled) && live.allows(Paused));
        }
        assert!(Publishing.allows(Failed) && !Publishing.allows(Cancelled) && !Publishing.allows(Paused));
        for next in Status::ALL {
            assert!(!Succeeded.allows(next) && !Cancelled.allows(next), "{next:?}");
        }
    }
}
