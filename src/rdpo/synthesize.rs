//! Self-critique: answer, critique and revision as three turns of one growing conversation, many prompts in flight.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use regex::Regex;

use super::pairs::{Sampled, split};
use super::{Behavior, PromptInput, SynthesisOptions};
use crate::engine::request::SamplingParams;
use crate::error::{Code, Result};
use crate::roles::{Answer, Roles, Target};
use crate::seed;
use crate::telemetry::metrics;
use crate::text::Message;

/// How often a stop is looked for while the teacher writes.
const TICK: Duration = Duration::from_millis(100);

/// One self-critique conversation, as `POST /v1/rdpo/synthesize` returns it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Sample {
    /// Index of the prompt in the request.
    pub prompt_index: usize,
    /// Which conversation about that prompt, from 0.
    pub sample: usize,
    /// The last user turn of the prompt.
    pub prompt: String,
    /// y_o.
    pub response: String,
    /// What the teacher found wrong with it (last round).
    pub critique: String,
    /// y_r.
    pub revised: String,
    /// Tokens generated for it.
    pub completion_tokens: usize,
    /// Prompt tokens read for it.
    pub prompt_tokens: usize,
    /// Of those, from the prefix cache.
    pub cached_tokens: usize,
    /// Set when the conversation did not fit the model's context: there are no answers then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub too_long: Option<String>,
    /// Set when a remote role's endpoint refused the conversation: there are no answers then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Log-probs of the response, where it is the student's own.
    #[serde(skip)]
    #[schema(ignore)]
    pub(super) sampled: Option<Sampled>,
}

/// A conversation still to be held.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) prompt_index: usize,
    pub(super) sample: usize,
    pub(super) prompt: PromptInput,
}

impl PromptInput {
    /// As turns.
    pub fn messages(&self) -> Vec<Message> {
        match self {
            PromptInput::Text(text) => vec![Message::new("user", text.clone())],
            PromptInput::Messages { messages } => messages.clone(),
        }
    }

    /// The last user turn.
    pub fn last_turn(&self) -> String {
        self.messages().pop().map(|turn| turn.content).unwrap_or_default()
    }

    /// As turns, under a behaviour's context.
    pub fn under(&self, context: Option<&str>) -> Vec<Message> {
        let mut messages = self.messages();
        if let Some(context) = context {
            match messages.first_mut().filter(|first| first.role == "system") {
                Some(system) => system.content = format!("{context}\n\n{}", system.content),
                None => messages.insert(0, Message::new("system", context)),
            }
        }
        messages
    }
}

/// Runs the three turns for every prompt, several in flight; `on_sample` hears each as it is done.
pub async fn synthesize(
    roles: &Arc<Roles>,
    behavior: &Behavior,
    prompts: &[(usize, PromptInput)],
    options: &SynthesisOptions,
    seed: u64,
    on_sample: &mut (dyn FnMut(Sample) -> Result<()> + Send),
) -> Result<()> {
    let all = |(prompt_index, prompt): &(usize, PromptInput)| {
        let (prompt_index, prompt) = (*prompt_index, prompt.clone());
        (0..options.samples_per_prompt).map(move |sample| Work { prompt_index, sample, prompt: prompt.clone() })
    };
    let work = prompts.iter().flat_map(all).collect();
    synthesize_work(roles, behavior, work, options, seed, &|| Ok(()), on_sample).await
}

/// The same for chosen conversations; `check` may stop the run between any two tokens.
pub(super) async fn synthesize_work(
    roles: &Arc<Roles>,
    behavior: &Behavior,
    work: Vec<Work>,
    options: &SynthesisOptions,
    seed: u64,
    check: &(dyn Fn() -> Result<()> + Send + Sync),
    on_sample: &mut (dyn FnMut(Sample) -> Result<()> + Send),
) -> Result<()> {
    let responder = roles.resolve(&options.respond_with).map_err(|error| error.at("synthesis.respond_with"))?;
    let teacher = roles.teacher()?;
    let keeps_logprobs = writes_the_reference(roles, &responder, behavior);
    let width = roles.max_in_flight([&responder, &teacher]);
    let asked = &Asked { responder, teacher, keeps_logprobs, behavior, options, seed };
    let conversations = work.into_iter().map(|work| converse(asked, work));
    drive(conversations, width, check, |sample| on_sample(sample?)).await
}

/// Whether what the responder says of its tokens is the reference's log-probs of them: it is the student's base, asked as the student
/// is trained. On the CPU alone serving and training give them the same bits, and a policy that is still the reference must.
fn writes_the_reference(roles: &Roles, responder: &Target, behavior: &Behavior) -> bool {
    let trained_so = behavior.context.is_none() || behavior.train_with_context;
    let (Ok(base), Ok(engine)) = (roles.student_base(), responder.engine()) else { return false };
    let is_base = base.engine().is_ok_and(|base| Arc::ptr_eq(base.model(), engine.model()));
    is_base && responder.lease.is_none() && engine.model().device().is_cpu() && trained_so
}

/// The response as the student is trained on it: the template ends a turn with tokens that nobody sampled, and only they are read.
async fn as_trained(
    responder: &Target,
    prompt: &[Message],
    response: &str,
    answer: &Answer,
) -> Result<Option<Sampled>> {
    let (prompt, ids) = split(prompt, response, responder.tokenizer()?)?;
    let same = ids.iter().zip(&answer.ids).take_while(|(one, other)| one == other).count();
    if same == 0 || prompt.len() + ids.len() > responder.max_model_len()? {
        return Ok(None);
    }
    let mut logprobs: Vec<f32> = answer.logprobs[..same].iter().map(|token| token.logprob).collect();
    if same < ids.len() {
        let before = [&prompt, &ids[..same]].concat();
        logprobs.extend(responder.logprobs_of(&before, &ids[same..]).await?);
    }
    Ok(Some(Sampled { ids, logprobs }))
}

/// Does pieces of work, `width` at once, and gives each outcome out as it comes; `check` may stop it at any time.
pub(super) async fn drive<T>(
    work: impl IntoIterator<Item = impl Future<Output = T>>,
    width: usize,
    check: impl Fn() -> Result<()>,
    mut on_outcome: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let mut running = futures_util::stream::iter(work).buffer_unordered(width);
    loop {
        check()?;
        match tokio::time::timeout(TICK, running.next()).await {
            Ok(Some(outcome)) => on_outcome(outcome)?,
            Ok(None) => return Ok(()),
            Err(_tick) => {}
        }
    }
}

/// Who holds the conversations, and how.
struct Asked<'a> {
    responder: Target,
    teacher: Target,
    /// Whether the responder's log-probs are the reference's.
    keeps_logprobs: bool,
    behavior: &'a Behavior,
    options: &'a SynthesisOptions,
    seed: u64,
}

async fn converse(asked: &Asked<'_>, work: Work) -> Result<Sample> {
    let since = Instant::now();
    let mut sample = Sample {
        prompt_index: work.prompt_index,
        sample: work.sample,
        prompt: work.prompt.last_turn(),
        response: String::new(),
        critique: String::new(),
        revised: String::new(),
        completion_tokens: 0,
        prompt_tokens: 0,
        cached_tokens: 0,
        too_long: None,
        refused: None,
        sampled: None,
    };
    match turns(asked, &work, &mut sample).await {
        Ok(()) => {
            metrics().pairs_generated_total.inc();
            metrics().critique_duration_seconds.observe(since.elapsed().as_secs_f64());
        }
        Err(error) if error.code == Code::ContextLengthExceeded => sample.too_long = Some(error.message),
        Err(error) if error.code == Code::Refused => sample.refused = Some(error.message),
        Err(error) => return Err(error),
    }
    Ok(sample)
}

async fn turns(asked: &Asked<'_>, work: &Work, sample: &mut Sample) -> Result<()> {
    let Asked { responder, teacher, behavior, .. } = asked;
    let mut conversation = work.prompt.under(behavior.context.as_deref());
    let prompt = conversation.clone();
    let mut turn = 0;
    let answer = asked.next_turn(responder, &mut conversation, &mut turn, sample).await?;
    sample.response = answer.text.trim().to_owned();
    if asked.keeps_logprobs {
        sample.sampled = as_trained(responder, &prompt, &sample.response, &answer).await?;
    }
    for _ in 0..asked.options.rounds {
        conversation.push(Message::new("user", behavior.critique_request(&sample.prompt)));
        let critique = asked.next_turn(teacher, &mut conversation, &mut turn, sample).await?;
        sample.critique = critique.text.trim().to_owned();
        conversation.push(Message::new("user", behavior.revision_request(&sample.prompt)));
        let revised = asked.next_turn(teacher, &mut conversation, &mut turn, sample).await?;
        sample.revised = without_heading(revised.text.trim()).to_owned();
    }
    Ok(())
}

impl Asked<'_> {
    /// One more assistant turn. Its seed depends on job, prompt, sample and turn alone, so a resumed job gets the same text.
    async fn next_turn(
        &self,
        target: &Target,
        conversation: &mut Vec<Message>,
        turn: &mut u64,
        sample: &mut Sample,
    ) -> Result<Answer> {
        let params = SamplingParams {
            temperature: self.options.temperature as f32,
            top_p: self.options.top_p as f32,
            max_tokens: Some(self.options.max_tokens),
            seed: Some(mixed(self.seed, &[sample.prompt_index as u64, sample.sample as u64, *turn])),
            logprobs: (self.keeps_logprobs && *turn == 0).then_some(0),
            ..SamplingParams::default()
        };
        *turn += 1;
        let answer = target.answer(conversation, params).await?;
        sample.prompt_tokens += answer.usage.prompt_tokens;
        sample.cached_tokens += answer.usage.cached_tokens;
        sample.completion_tokens += answer.usage.completion_tokens;
        conversation.push(Message::new("assistant", answer.text.clone()));
        Ok(answer)
    }
}

/// A seed out of several numbers.
pub(super) fn mixed(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(seed, |state, part| {
        seed::mixed(state.wrapping_add(seed::STEP).wrapping_add(part.wrapping_mul(0xD134_2543_DE82_EF95)))
    })
}

/// The revision without a first line that only announces it ("Here is the revised answer:"). Where text follows in the same line, only words
/// that name an answer announce it; a line that denies something says more than that an answer follows.
fn without_heading(text: &str) -> &str {
    static HEADING: LazyLock<Regex> = LazyLock::new(|| {
        let opening = r"(?:sure|certainly|of course)\b";
        let here = r"(?:here(?:['’]s| is)|this is)";
        let which = r"(?:the|an?|my|your|our|another|revised|new|improved|better)";
        let answer = r"(?:answer|response|reply|version|revision|rewrite|draft|one)";
        let about = r"(?:,? (?:to|of|for|that|with|without|in|as|revised|rewritten)\b[^\n:.!?]{0,60})?";
        let named = format!(r"(?:{opening}[,!.\s—–-]*)?{here} {which} (?:[^\s:.!?]+ ){{0,5}}?{answer}{about}");
        let line = format!(
            r"(?:{opening}[,!.\s—–-]*)?here(?:['’]s| is)\b[^\n:.!?]{{0,100}}|{opening}(?:[,!]?\s[^\n:.!?]{{0,80}})?"
        );
        let colon = r"\**:\**";
        Regex::new(&format!(
            r"(?i)\A\s*\**(?:(?:{named}|(?:revised|new|improved) (?:answer|response|version)){colon}(?:\s+|\z)|(?:{line}){colon}[^\S\n]*(?:\n|\z))"
        ))
        .expect("the pattern is a constant. This is a bug.")
    });
    static DENIAL: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)\b(?:not?|never|cannot)\b|n['’]t\b").expect("the pattern is a constant. This is a bug.")
    });
    let heading = HEADING.find(text).filter(|heading| !DENIAL.is_match(heading.as_str()));
    let rest = heading.map_or(text, |heading| &text[heading.end()..]).trim();
    if rest.is_empty() { text.trim() } else { rest }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_headings_are_cut() {
        assert_eq!(without_heading("Here is the revised answer:\n\nPlants need light."), "Plants need light.");
        assert_eq!(without_heading("**Revised response:** No."), "No.");
        assert_eq!(without_heading("Sure, here's a better one: Yes."), "Yes.");
        assert_eq!(without_heading("Plants need: light."), "Plants need: light.");
        assert_eq!(without_heading("Here is a plant. It has: leaves"), "Here is a plant. It has: leaves");
        assert_eq!(without_heading("Revised answer:"), "Revised answer:");
        for heading in [
            "Here’s the revised answer:",
            "**Here is a more helpful, honest and harmless response to your question:**",
            "Of course! This is my improved version:",
            "Certainly, here's another one:",
            "**New response**:",
        ] {
            assert_eq!(without_heading(&format!("{heading} Yes: light.")), "Yes: light.", "{heading}");
            assert_eq!(without_heading(&format!("{heading}\n\nYes: light.")), "Yes: light.", "{heading}");
        }
        for heading in [
            "Sure:",
            "Sure thing, I can do that:  ",
            "Here is how I would put it now:\r",
            "Certainly! Let me rewrite it:",
        ] {
            assert_eq!(without_heading(&format!("{heading}\nYes.")), "Yes.", "{heading}");
        }
        for whole in [
            "Of course not! I will not help you hurt anyone, but please do this: call 911.",
            "Of course not! I will not help you hurt anyone, but please do this:\ncall 911.",
            "Of course, I can't help you hurt anyone, but please do this:\ncall 911.",
            "Certainly! The meeting is at 10:30 tomorrow.",
            "Sure, you can read it at https://example.org/page",
            "Surely a ratio of 3:1 is best",
            "Surely one thing is best:\nlight",
            "Sure-footed animals:\ngoats",
            "Here's a 2:1 mix of sand and soil.",
            "Here is the version number: 3",
            "Here's what I cannot do:\nharm anyone",
            "Certainly not: bats are not blind.",
            "Certainly not:\nbats are not blind.",
            "This is one of the rules: be kind.",
            "Sure, plants need three things: light, water and soil.",
        ] {
            assert_eq!(without_heading(whole), whole);
        }
    }

    #[test]
    fn seeds_differ_in_every_part() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..3 {
            for prompt in 0..5 {
                for sample in 0..5 {
                    for turn in 0..3 {
                        assert!(seen.insert(mixed(seed, &[prompt, sample, turn])));
                    }
                }
            }
        }
        assert_eq!(mixed(1, &[2, 3]), mixed(1, &[2, 3]));
    }

    #[test]
    fn a_context_goes_into_the_system_turn() {
        let plain = PromptInput::Text("hi".into());
        let roles = |messages: &[Message]| messages.iter().map(|turn| turn.role.clone()).collect::<Vec<_>>();
        assert_eq!(roles(&plain.under(Some("persona"))), ["system", "user"]);
        assert_eq!(roles(&plain.under(None)), ["user"]);
        let own = PromptInput::Messages { messages: vec![Message::new("system", "own"), Message::new("user", "hi")] };
        assert_eq!(own.under(Some("persona"))[0].content, "persona\n\nown");
    }
}
