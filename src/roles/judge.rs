//! Reads a score out of a chat model: the expected value over the allowed numbers, or the number it writes.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::json;

use super::flight::usage;
use super::{JudgeMode, Remote, Rubric, Score, Start, Target};
use crate::engine::{SamplingParams, Task, Usage};
use crate::error::{Code, Error, Result};
use crate::text::{Message, RenderOptions};

/// Below this mass on the allowed values the judge did not answer the question.
const LEAST_MASS: f64 = 1e-4;
/// Most values a range may have.
const MOST_VALUES: i64 = 1001;

/// Puts values into `{name}` places, in one pass: text that is filled in is not searched again.
pub fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let hit =
            values.iter().find(|(name, _)| rest[1..].strip_prefix(name).is_some_and(|after| after.starts_with('}')));
        match hit {
            Some((name, value)) => {
                out.push_str(value);
                rest = &rest[name.len() + 2..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

impl Rubric {
    /// How a judge is asked where neither a behaviour nor `roles.reward.rubric` says it.
    pub(super) fn general() -> Self {
        let prompt = "You grade answers of an assistant. A good answer is correct, does what was asked and is clear.\n\
                      Grade on this scale: 1 = wrong or useless, 2 = poor, 3 = partly right, 4 = good, 5 = excellent.\n\
                      Reply with the number only.\n\nRequest:\n{prompt}\n\nAnswer:\n{response}\n\nGrade from 1 to 5:";
        Rubric { prompt: prompt.into(), min: 1, max: 5, mode: JudgeMode::Expected, label: None, max_tokens: None }
    }

    /// Range and placeholder checks; `prefix` is put before field names (`behavior.judge.max`).
    pub fn validate(&self, prefix: &str) -> Result<()> {
        for place in ["{prompt}", "{response}"] {
            if !self.prompt.contains(place) {
                return Err(Error::invalid(format!("{prefix}.prompt"), format!("must contain {place}")));
            }
        }
        if self.max <= self.min {
            return Err(Error::invalid(format!("{prefix}.max"), format!("must be above min ({})", self.min)));
        }
        if self.max.checked_sub(self.min).is_none_or(|range| range >= MOST_VALUES) {
            return Err(Error::invalid(
                format!("{prefix}.max"),
                format!("at most {MOST_VALUES} values from min to max"),
            ));
        }
        if self.max_tokens == Some(0) {
            return Err(Error::invalid(format!("{prefix}.max_tokens"), "must be at least 1"));
        }
        if self.label.as_ref().is_some_and(|label| label.trim().is_empty()) {
            return Err(Error::invalid(format!("{prefix}.label"), "must not be empty"));
        }
        Ok(())
    }
}

/// What to do where an endpoint's log-probabilities do not tell the score.
const INSTEAD: &str = "set `mode = \"generate\"` in the rubric, and let it ask for a line `Score: <number>`";

impl Rubric {
    /// Whether a judge at an endpoint can be read. One token tells values apart that are one digit; a "1" could go on to "10".
    pub(super) fn check_afar(&self) -> Result<()> {
        if self.mode == JudgeMode::Expected && (self.min < 0 || self.max > 9) {
            let text = format!("a remote judge's expected score is read from one token: keep to 0..=9, or {INSTEAD}");
            return Err(Error::invalid("judge.max", text));
        }
        Ok(())
    }
}

/// Asks the judge about the last assistant turn.
pub(super) async fn judge(target: &Target, rubric: &Rubric, prompt: &str, response: &str) -> Result<Score> {
    let question = vec![Message::new("user", fill(&rubric.prompt, &[("prompt", prompt), ("response", response)]))];
    match rubric.mode {
        JudgeMode::Expected => match target.remote() {
            Some(remote) => expected_afar(remote, rubric, &question).await,
            None => expected(target, rubric, &question).await,
        },
        JudgeMode::Generate => generate(target, rubric, &question).await,
    }
}

/// Σ v·p(v) / Σ p(v) over the allowed values. A value of several tokens has the product of their probabilities; where one
/// value is the beginning of another ("1" of "10"), the shorter one has what does not go on to a longer one.
async fn expected(target: &Target, rubric: &Rubric, question: &[Message]) -> Result<Score> {
    let prompt = target.tokenizer()?.encode_chat(question, &RenderOptions::default())?;
    let values = value_tokens(target, rubric)?;
    let mut spent = Score { value: 0.0, prompt_tokens: 0, completion_tokens: 0 };
    let (mut mass, mut sum) = (0.0, 0.0);
    // (tokens so far, their probability); the empty start is the question itself.
    let mut open: Vec<(Vec<u32>, f64)> = vec![(Vec::new(), 1.0)];
    while let Some((start, probability)) = open.pop() {
        let mut children: Vec<u32> = values
            .keys()
            .filter(|ids| ids.len() > start.len() && ids.starts_with(&start))
            .map(|ids| ids[start.len()])
            .collect();
        children.sort_unstable();
        children.dedup();
        let mut on = 0.0;
        if !children.is_empty() {
            let params = SamplingParams { max_tokens: Some(1), temperature: 0.0, ..SamplingParams::default() };
            let mut request = target.request([prompt.as_slice(), &start].concat(), params);
            request.task = Task::NextToken(children.clone());
            let answer = target.ask(request).await?;
            spent.prompt_tokens += answer.usage.prompt_tokens;
            for (id, logprob) in children.iter().zip(&answer.next_token) {
                let p = f64::from(*logprob).exp();
                on += p;
                let mut longer = start.clone();
                longer.push(*id);
                open.push((longer, probability * p));
            }
        }
        if let Some(value) = values.get(&start) {
            let here = probability * (1.0 - on).max(0.0);
            mass += here;
            sum += here * *value as f64;
        }
    }
    Ok(Score { value: mean(rubric, sum, mass)?, ..spent })
}

fn mean(rubric: &Rubric, sum: f64, mass: f64) -> Result<f64> {
    if mass.is_nan() || mass < LEAST_MASS {
        return Err(unreadable(format!(
            "the judge gives the numbers {}..={} only {mass:.1e} of its probability",
            rubric.min, rubric.max
        )));
    }
    Ok(sum / mass)
}

/// The same from what an endpoint tells: the likeliest first tokens of the answer.
async fn expected_afar(remote: &Remote, rubric: &Rubric, question: &[Message]) -> Result<Score> {
    rubric.check_afar()?;
    let mut body = Remote::question(question)?;
    let fields =
        [("max_tokens", json!(1)), ("temperature", json!(0)), ("logprobs", json!(true)), ("top_logprobs", json!(20))];
    body.extend(fields.map(|(key, value)| (key.to_owned(), value)));
    let reply = remote.complete(Start::Chat, body).await.map_err(|error| match error.code {
        Code::InvalidValue | Code::Refused if error.message.contains("logprobs") => {
            Error::invalid("judge.mode", format!("{}: {INSTEAD}", error.message))
        }
        _ => error,
    })?;
    let Some(likeliest) = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array() else {
        let text = format!("the judge's endpoint gives no `top_logprobs`: {INSTEAD}");
        return Err(Error::invalid("judge.mode", text));
    };
    let (mut mass, mut sum) = (0.0, 0.0);
    for entry in likeliest {
        // Vocabularies have " 7" beside "7".
        let value = entry["token"].as_str().and_then(|token| token.trim().parse::<i64>().ok());
        if let Some(value) = value.filter(|value| (rubric.min..=rubric.max).contains(value)) {
            let p = entry["logprob"].as_f64().map_or(0.0, f64::exp);
            mass += p;
            sum += p * value as f64;
        }
    }
    let Usage { prompt_tokens, completion_tokens, .. } = usage(&reply);
    Ok(Score { value: mean(rubric, sum, mass)?, prompt_tokens, completion_tokens })
}

/// Tokens of every allowed value where the assistant's turn begins.
fn value_tokens(target: &Target, rubric: &Rubric) -> Result<BTreeMap<Vec<u32>, i64>> {
    let tokenizer = target.tokenizer()?;
    let user = Message::new("user", "?");
    let before = tokenizer.encode_chat(std::slice::from_ref(&user), &RenderOptions::default())?;
    let open = RenderOptions { add_generation_prompt: false, continue_final_message: true, ..RenderOptions::default() };
    (rubric.min..=rubric.max)
        .map(|value| {
            let text = value.to_string();
            let turn = [user.clone(), Message::new("assistant", text.clone())];
            let in_place = tokenizer.encode_chat(&turn, &open).ok();
            let ids = match in_place.as_ref().and_then(|ids| ids.strip_prefix(before.as_slice())) {
                Some(ids) if !ids.is_empty() => ids.to_vec(),
                _ => tokenizer.encode(&text, false)?,
            };
            if ids.is_empty() {
                return Err(Error::unprocessable(
                    "judge.min",
                    format!("the judge's tokenizer has no token for {value}"),
                ));
            }
            Ok((ids, value))
        })
        .collect()
}

async fn generate(target: &Target, rubric: &Rubric, question: &[Message]) -> Result<Score> {
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: Some(rubric.max_tokens.unwrap_or(256)),
        ..SamplingParams::default()
    };
    let answer = target.answer(question, params).await?;
    let value = read_score(&answer.text, rubric)?;
    Ok(Score { value, prompt_tokens: answer.usage.prompt_tokens, completion_tokens: answer.usage.completion_tokens })
}

/// The last `Label: <number>` of a text, with its sign; an error when there is none or it is out of range.
fn read_score(text: &str, rubric: &Rubric) -> Result<f64> {
    let label = rubric.label.as_deref().unwrap_or("Score");
    let pattern = format!(r"(?i){}[*_`]*\s*[:=][\s*_`]*([+-]?\d+(?:\.\d+)?)", regex::escape(label));
    let pattern = Regex::new(&pattern).map_err(|error| Error::invalid("judge.label", error.to_string()))?;
    let last = pattern.captures_iter(text).last();
    let number = last.and_then(|found| found[1].parse::<f64>().ok());
    match number {
        Some(value) if value >= rubric.min as f64 && value <= rubric.max as f64 => Ok(value),
        Some(value) => {
            Err(unreadable(format!("the judge wrote {value}, which is not in {}..={}", rubric.min, rubric.max)))
        }
        None => Err(unreadable(format!("the judge wrote no `{label}: <number>`"))),
    }
}

pub(super) fn unreadable(message: String) -> Error {
    crate::telemetry::metrics().reward_parse_failures_total.inc();
    Error::unprocessable("reward", message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rubric() -> Rubric {
        Rubric {
            prompt: "{prompt} / {response}".into(),
            min: -5,
            max: 10,
            mode: JudgeMode::Generate,
            label: None,
            max_tokens: None,
        }
    }

    #[test]
    fn filled_text_is_not_searched_again() {
        let text = fill("a {prompt} b {response} {other} {", &[("prompt", "{response}"), ("response", "R")]);
        assert_eq!(text, "a {response} b R {other} {");
    }

    #[test]
    fn the_last_number_after_the_label_counts() {
        let read = |text: &str| read_score(text, &rubric());
        assert_eq!(read("Score: 3 at first. On reflection, score: -2.5").unwrap(), -2.5);
        assert_eq!(read("**Score:** 7").unwrap(), 7.0);
        assert_eq!(read("A score: 5 would be perfect. Score: **2**").unwrap(), 2.0);
        for bad in ["", "7", "Score: high", "Score: 11", "Score: -6"] {
            let error = read(bad).unwrap_err();
            assert_eq!((error.status(), error.param.as_deref()), (422, Some("reward")), "{bad}");
        }
    }

    #[test]
    fn a_bad_rubric_names_its_field() {
        let param = |rubric: Rubric| rubric.validate("judge").unwrap_err().param.unwrap();
        assert_eq!(param(Rubric { max: -5, ..rubric() }), "judge.max");
        assert_eq!(param(Rubric { min: i64::MIN, max: i64::MAX, ..rubric() }), "judge.max");
        assert_eq!(param(Rubric { prompt: "{prompt}".into(), ..rubric() }), "judge.prompt");
        assert_eq!(param(Rubric { label: Some(" ".into()), ..rubric() }), "judge.label");
        rubric().validate("judge").unwrap();
    }
}
