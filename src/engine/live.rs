//! One request that runs in the native engine: its sequence, and what several rows of logits at once say of it.

use rayon::prelude::*;

use super::lookup::Draft;
use super::scheduler::Sequence;
use super::writer::{Outcome, Writer};

/// What the owner thread knows of a request besides its sequence.
pub(super) struct Live {
    pub(super) writer: Writer,
    pub(super) started: bool,
}

impl Live {
    pub(super) fn new(writer: Writer) -> Self {
        Live { writer, started: false }
    }

    pub(super) fn role(&self) -> &'static str {
        self.writer.request.role
    }

    /// Its sequence, not begun.
    pub(super) fn sequence(&self, id: u64) -> Sequence {
        let request = &self.writer.request;
        let generation = request.adapter.as_ref().map(|adapter| adapter.generation.clone());
        let mut sequence = Sequence::new(id, request.prompt.clone(), generation, true);
        (sequence.priority, sequence.role) = (request.params.priority, request.role);
        if request.params.prompt_logprobs.is_some() {
            // A token's log-probability needs the row before it computed.
            sequence.reusable = request.params.prompt_logprobs_start.saturating_sub(1);
        }
        if let Some(salt) = &request.params.cache_salt {
            sequence.salt(salt);
        }
        sequence
    }

    /// How long a draft may be: the last token that has room follows it, and nothing follows an end.
    pub(super) fn room(&self, sequence: &Sequence) -> usize {
        (sequence.prompt_len + self.writer.room()).saturating_sub(sequence.settled() + 1)
    }

    /// What the grammar leaves no choice about.
    pub(super) fn forced(&self, most: usize) -> Option<Draft> {
        self.writer.forced(most).map(Draft::forced)
    }

    /// What the logits after the sequence's last token say, and those after each token of its draft up to the first that is
    /// another than drafted.
    pub(super) fn outcomes(&self, sequence: &Sequence, rows: Vec<Vec<f32>>) -> Vec<Outcome> {
        let draft = &sequence.tokens[sequence.settled()..];
        let right = |at: usize, outcome: &Outcome| outcome.token().is_some_and(|token| draft.get(at) == Some(&token));
        let outcome = |(at, mut row): (usize, Vec<f32>)| {
            let (prompt, output) = sequence.tokens[..sequence.settled() + at].split_at(sequence.prompt_len);
            self.writer.read(prompt, output, &mut row)
        };
        if !self.writer.has_grammar() {
            let mut outcomes: Vec<Outcome> = rows.into_par_iter().enumerate().map(outcome).collect();
            let wrong = outcomes.iter().enumerate().position(|(at, outcome)| !right(at, outcome));
            outcomes.truncate(wrong.map_or(usize::MAX, |at| at + 1));
            return outcomes;
        }
        // A grammar's state moves with each token.
        let mut outcomes = Vec::new();
        for (at, row) in rows.into_iter().enumerate() {
            outcomes.push(outcome((at, row)));
            if !right(at, &outcomes[at]) {
                break;
            }
        }
        outcomes
    }
}
