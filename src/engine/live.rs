//! One request that runs in the native engine: its sequence, and what several rows of logits at once say of it.

use rayon::prelude::*;

use super::lookup::Draft;
use super::scheduler::Sequence;
use super::writer::{Outcome, Writer};
use crate::error::Error;
use crate::model::{SampleRow, Sampled};
use crate::text::TokenMask;

/// What a GPU is asked of a sequence's rows.
pub(super) struct Questions {
    /// One a row.
    pub(super) rows: Vec<SampleRow>,
    /// What happened instead of a question, and at which row.
    failed: Option<(usize, Error)>,
}

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
    pub(super) fn forced(&self, sequence: &Sequence, most: usize) -> Option<Draft> {
        self.writer.forced(&sequence.tokens[sequence.prompt_len..], most).map(Draft::forced)
    }

    /// What the logits after the sequence's last token say, and those after each token of its draft up to the first that is
    /// another than drafted.
    pub(super) fn outcomes(&self, sequence: &Sequence, rows: Vec<Vec<f32>>) -> Vec<Outcome> {
        let right = |at: usize, outcome: &Outcome| is_drafted(sequence, at, outcome);
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

    /// What a GPU is asked to say what [`Live::outcomes`] would of `count` rows of `v` logits. Each row is asked about as if the draft
    /// were right up to it, as it is read only then: a grammar's state is moved on by the draft, aside.
    pub(super) fn questions(&self, sequence: &Sequence, count: usize, v: usize) -> Questions {
        let question = |at: usize, mask: Option<&TokenMask>| {
            let (prompt, output) = sequence.tokens[..sequence.settled() + at].split_at(sequence.prompt_len);
            self.writer.question(prompt, output, mask, v)
        };
        let Some(mut held) = self.writer.matcher() else {
            return Questions { rows: (0..count).map(|at| question(at, None)).collect(), failed: None };
        };
        let mut fork = (count > 1).then(|| held.fork());
        let matcher = fork.as_mut().unwrap_or(&mut held);
        let (mut rows, mut failed) = (Vec::with_capacity(count), None);
        for at in 0..count {
            let mask = match matcher.mask() {
                Ok(mask) => mask,
                Err(error) => {
                    failed = Some((at, error));
                    break;
                }
            };
            rows.push(question(at, Some(&mask)));
            // What the grammar does not let come is not drawn, and no row behind it read.
            let draft = sequence.tokens.get(sequence.settled() + at);
            if !draft.is_some_and(|token| mask.allows(*token) && matcher.commit(*token).is_ok()) {
                break;
            }
        }
        rows.resize_with(count, SampleRow::default);
        Questions { rows, failed }
    }

    /// What the replies to [`Live::questions`] say, up to the first that is another token than drafted.
    pub(super) fn answers(&self, sequence: &Sequence, questions: &Questions, replies: Vec<Sampled>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for (at, reply) in replies.into_iter().enumerate() {
            outcomes.push(match &questions.failed {
                Some((place, error)) if *place == at => Outcome::Failed(error.clone()),
                _ => self.writer.answer(reply),
            });
            if !is_drafted(sequence, at, &outcomes[at]) {
                break;
            }
        }
        outcomes
    }
}

/// Whether the outcome of a sequence's row is the token drafted behind it.
fn is_drafted(sequence: &Sequence, at: usize, outcome: &Outcome) -> bool {
    outcome.token().is_some_and(|token| sequence.tokens.get(sequence.settled() + at) == Some(&token))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::super::request::{Event, Request, SamplingParams, Task, Usage};
    use super::super::scheduler::{Limits, Scheduler};
    use super::super::writer::Ending;
    use super::*;
    use crate::kernels::cuda::sampled;
    use crate::text::{Constraint, Grammar, Tokenizer, TokenizerOptions};

    const V: usize = 100;

    /// A token for each printable character and one for the end, and ids beyond them.
    fn letters() -> Arc<Tokenizer> {
        let words = (0x21..=0x7eu8).map(|byte| char::from(byte).to_string()).chain(["</s>".to_owned()]);
        let vocab: serde_json::Map<_, _> = words.zip(0..).map(|(word, id)| (word, serde_json::json!(id))).collect();
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let end = serde_json::json!({"id": 94, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false});
        let json = serde_json::json!({"version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let options = TokenizerOptions {
            tokenizer_json: json.to_string(),
            eos_token: Some("</s>".into()),
            eos_token_ids: vec![94],
            ..TokenizerOptions::default()
        };
        Arc::new(Tokenizer::new(options).unwrap())
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| u32::from(byte) - 0x21).collect()
    }

    /// Runs the request's sequence, 0, with a draft.
    fn drafted(live: &Live, draft: &[u32]) -> Scheduler {
        let limits = Limits { block_size: 16, max_batch_tokens: 64, max_sequences: 1, prefix_caching: false };
        let mut scheduler = Scheduler::new(limits, 8);
        scheduler.add(live.sequence(0));
        scheduler.schedule();
        assert_eq!(scheduler.draft(0, draft), draft.len());
        scheduler
    }

    /// Rows in which what `text` writes is likely, so that drafts are right now and then.
    fn rows(text: &[u32], seed: u64) -> Vec<Vec<f32>> {
        let row = |at: usize| {
            let noise = |id: u64| ((seed * 31 + at as u64 * 7 + id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
            let mut row: Vec<f32> = (0..V as u64).map(|id| noise(id) / 16_777_216.0 * 4.0).collect();
            row[text.get(at).map_or(94, |id| *id as usize)] += 6.0;
            row
        };
        (0..=text.len()).map(row).collect()
    }

    #[test]
    fn who_listens_hears_of_an_end_once_also_of_a_request_that_is_lost() {
        let tokenizer = letters();
        for ends in [true, false] {
            let (events, mut heard) = tokio::sync::mpsc::unbounded_channel();
            let (prompt, params) = (ids("some-prompt"), SamplingParams::default());
            let request = Request { prompt, params, adapter: None, task: Task::Generate, role: "student" };
            let mut live = Live::new(Writer::new(request, events, tokenizer.clone(), 64));
            if ends {
                live.writer.end(Ending::Score(1.0), Usage::default());
            }
            drop(live);
            let found = heard.try_recv().unwrap();
            assert!(matches!(found, Event::Score(..)) == ends && matches!(found, Event::Failed(_)) != ends);
            assert!(heard.try_recv().is_err());
        }
    }

    #[test]
    fn a_gpu_is_asked_what_gives_the_same_outcomes_drafts_and_grammars_included() {
        let tokenizer = letters();
        let grammar = Arc::new(Grammar::compile(&tokenizer, Constraint::Regex("ab(c|d)e{1,2}".into())).unwrap());
        let plain = SamplingParams {
            logprobs: Some(2),
            repetition_penalty: 1.3,
            frequency_penalty: 0.5,
            bad_words: vec![ids("ab"), ids("bc"), ids("q")],
            min_tokens: 3,
            ..SamplingParams::default()
        };
        let held = SamplingParams { grammar: Some(grammar), ..SamplingParams::default() };
        let (mut longest, mut wrong) = (0, 0);
        for params in [plain, held] {
            for (draft, likely) in [("", "ab"), ("abce", "abce"), ("abcee", "abceee"), ("abd", "abce"), ("abx", "abx")]
            {
                for seed in 0..25 {
                    let params = SamplingParams { seed: Some(seed), ..params.clone() };
                    let live = || {
                        let (events, _) = tokio::sync::mpsc::unbounded_channel();
                        let (prompt, params) = (ids("some-prompt"), params.clone());
                        let request = Request { prompt, params, adapter: None, task: Task::Generate, role: "student" };
                        Live::new(Writer::new(request, events, tokenizer.clone(), 64))
                    };
                    let (host, device) = (live(), live());
                    let scheduler = drafted(&host, &ids(draft));
                    let sequence = scheduler.get(0).unwrap();
                    let rows: Vec<_> = rows(&ids(likely), seed).into_iter().take(draft.len() + 1).collect();
                    let questions = device.questions(sequence, rows.len(), V);
                    let Some(replies) = sampled(&rows.concat(), V, &questions.rows) else { return };
                    let found = device.answers(sequence, &questions, replies);
                    let wanted = host.outcomes(sequence, rows);
                    let tokens = |outcomes: &[Outcome]| outcomes.iter().map(Outcome::token).collect::<Vec<_>>();
                    assert_eq!(tokens(&found), tokens(&wanted), "draft {draft}, seed {seed}");
                    let kinds = |outcomes: &[Outcome]| outcomes.iter().map(std::mem::discriminant).collect::<Vec<_>>();
                    assert_eq!(kinds(&found), kinds(&wanted));
                    (longest, wrong) = (longest.max(found.len()), wrong + usize::from(found.len() <= draft.len()));
                    let next = |live: &Live| {
                        live.writer.matcher().map(|mut matcher| matcher.mask().ok().map(|mask| mask.words(V)))
                    };
                    assert_eq!(next(&device), next(&host), "the grammars are at the same place");
                }
            }
        }
        assert!(longest > 4 && wrong > 0, "drafts were right and were not: {longest}, {wrong}");
    }
}
