//! Reads and checks a job request; every error names the whole path of its field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Behavior, BehaviorRef, JobRequest, PairInput, PromptInput, PublishWhen};
use crate::error::{Code, Error, Result};
use crate::text::Message;
use crate::train::LoraOptions;

impl JobRequest {
    /// Reads and checks a body: unknown fields, types, ranges, empty prompts; every error names its field.
    pub fn parse(body: &Value) -> Result<Self> {
        let object = object(body, "body")?;
        let mut request = JobRequest::default();
        for (key, value) in object {
            match key.as_str() {
                "student" => request.student = field(key, value)?,
                "behavior" => request.behavior = behavior(value)?,
                "prompts" => request.prompts = prompts(key, value)?,
                "prompts_file" => request.prompts_file = field(key, value)?,
                "pairs" => {
                    request.pairs = list(key, value)?
                        .iter()
                        .enumerate()
                        .map(|(i, one)| pair(&format!("pairs[{i}]"), one))
                        .collect::<Result<_>>()?;
                }
                "eval_prompts" => request.eval_prompts = prompts(key, value)?,
                "synthesis" => request.synthesis = section(key, value)?,
                "scoring" => request.scoring = section(key, value)?,
                "loss" => request.loss = section(key, value)?,
                "lora" => {
                    request.lora = section(key, value)?;
                    check_init_from(&request.lora)?;
                }
                "training" => request.training = section(key, value)?,
                "publish" => {
                    let mut rest = self::object(value, key)?.clone();
                    let require = rest.remove("require");
                    request.publish = section(key, &Value::Object(rest))?;
                    if let Some(require) = require {
                        request.publish.require = section("publish.require", &require)?;
                    }
                }
                "seed" => request.seed = field(key, value)?,
                "metadata" => request.metadata = Value::Object(self::object(value, key)?.clone()),
                unknown => return Err(unknown_field(unknown)),
            }
        }
        request.validate()?;
        Ok(request)
    }

    fn validate(&self) -> Result<()> {
        let sources = [!self.prompts.is_empty(), self.prompts_file.is_some(), !self.pairs.is_empty()];
        match sources.iter().filter(|given| **given).count() {
            0 => {
                return Err(Error::invalid(
                    "prompts",
                    "give `prompts`, `prompts_file` or `pairs`, with at least one entry",
                ));
            }
            1 => {}
            _ => return Err(Error::invalid("prompts", "give only one of `prompts`, `prompts_file` and `pairs`")),
        }
        if self.student != "student" {
            let message = format!("`{}` cannot learn; the role that learns is `student`", self.student);
            return Err(Error::invalid("student", message));
        }
        if self.scoring.reward != "reward" {
            let message = format!("`{}` is no reward; the role that scores is `reward`", self.scoring.reward);
            return Err(Error::invalid("scoring.reward", message));
        }
        if self.prompts_file.as_ref().is_some_and(|file| file.trim().is_empty()) {
            return Err(Error::invalid("prompts_file", "must not be empty"));
        }
        let synthesis = &self.synthesis;
        within("synthesis.rounds", synthesis.rounds, 1, 4)?;
        within("synthesis.samples_per_prompt", synthesis.samples_per_prompt, 1, 64)?;
        within("synthesis.max_tokens", synthesis.max_tokens, 1, 131_072)?;
        if !(0.0..=2.0).contains(&synthesis.temperature) {
            return Err(Error::invalid("synthesis.temperature", "must be in [0, 2]"));
        }
        if !(f64::from(f32::MIN_POSITIVE)..=1.0).contains(&synthesis.top_p) {
            return Err(Error::invalid("synthesis.top_p", "must be in (0, 1]"));
        }
        let nothing_held_out = self.eval_prompts.is_empty() && self.training.eval_fraction == 0.0;
        let no_pairs_of_them = !self.eval_prompts.is_empty() && !self.pairs.is_empty();
        if self.training.eval_steps.is_some() && (nothing_held_out || no_pairs_of_them) {
            let message = "evaluates pairs of held-out prompts: set `training.eval_fraction`, and give no `eval_prompts` beside `pairs`";
            return Err(Error::invalid("training.eval_steps", message));
        }
        if self.scoring.min_gap.is_some_and(|gap| !gap.is_finite()) {
            return Err(Error::invalid("scoring.min_gap", "must be a finite number"));
        }
        if !(0.0..=1.0).contains(&self.publish.require.win_rate) {
            return Err(Error::invalid("publish.require.win_rate", "must be in [0, 1]"));
        }
        if self.publish.when == PublishWhen::EveryCheckpoint && self.publish.require.win_rate > 0.0 {
            let message = "`every_checkpoint` publishes before the report that `publish.require` asks for; use `end`";
            return Err(Error::invalid("publish.when", message));
        }
        let alias = &self.publish.alias;
        let plain = alias.starts_with(|c: char| c.is_ascii_alphanumeric())
            && alias.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
            && alias.len() <= 64;
        if !plain || matches!(alias.as_str(), "teacher" | "reward" | "live.json") {
            let message =
                format!("`{alias}` cannot be an adapter's name: letters, digits, `.`, `_`, `-`, no role's name");
            return Err(Error::invalid("publish.alias", message));
        }
        if let BehaviorRef::Inline(inline) = &self.behavior {
            inline.validate("behavior")?;
        }
        self.loss.validate("loss")?;
        self.lora.validate("lora")?;
        self.training.validate("training")
    }
}

/// The adapter to go on from has its own shape, so nothing else may be asked for.
fn check_init_from(lora: &LoraOptions) -> Result<()> {
    let Some(init) = &lora.init_from else { return Ok(()) };
    let (asked, usual) = (serde_json::to_value(lora)?, serde_json::to_value(LoraOptions::default())?);
    let own =
        asked.as_object().into_iter().flatten().find(|(key, value)| *key != "init_from" && usual[*key] != **value);
    match own {
        None => Ok(()),
        Some((key, _)) => {
            let message = format!("`{init}`, which the job goes on from, has its own; leave this out");
            Err(Error::invalid(format!("lora.{key}"), message))
        }
    }
}

/// Prompts of `POST /v1/rdpo/synthesize` and of a job.
pub fn prompts(path: &str, value: &Value) -> Result<Vec<PromptInput>> {
    list(path, value)?.iter().enumerate().map(|(index, one)| prompt(&format!("{path}[{index}]"), one)).collect()
}

/// A behaviour's name, or a recipe.
pub fn behavior(value: &Value) -> Result<BehaviorRef> {
    match value {
        Value::String(name) => Ok(BehaviorRef::Name(name.clone())),
        Value::Object(object) => {
            // Each text on its own first: serde's message for the whole would not say which field it means.
            for key in ["name", "principle", "critique", "revision"] {
                let text = object.get(key).ok_or_else(|| missing(&format!("behavior.{key}")))?;
                field::<String>(&format!("behavior.{key}"), text)?;
            }
            if let Some(context) = object.get("context") {
                field::<Option<String>>("behavior.context", context)?;
            }
            if let Some(flag) = object.get("train_with_context") {
                field::<bool>("behavior.train_with_context", flag)?;
            }
            let judge = self::object(object.get("judge").ok_or_else(|| missing("behavior.judge"))?, "behavior.judge")?;
            let whole = json!({"prompt": "", "min": 0, "max": 1});
            for key in ["prompt", "min", "max"] {
                judge.get(key).ok_or_else(|| missing(&format!("behavior.judge.{key}")))?;
            }
            for (key, value) in judge {
                let mut probe = whole.clone();
                probe[key] = value.clone();
                field_in::<crate::roles::Rubric>("behavior.judge", key, probe)?;
            }
            let inline: Behavior = serde_json::from_value(value.clone()).map_err(|error| at("behavior", &error))?;
            Ok(BehaviorRef::Inline(Box::new(inline)))
        }
        _ => Err(Error::invalid("behavior", "must be a name or an object")),
    }
}

fn prompt(path: &str, value: &Value) -> Result<PromptInput> {
    match value {
        Value::String(text) if text.trim().is_empty() => Err(Error::invalid(path, "the prompt is empty")),
        Value::String(text) => Ok(PromptInput::Text(text.clone())),
        Value::Object(object) => {
            if let Some(unknown) = object.keys().find(|key| *key != "messages") {
                return Err(unknown_field(&format!("{path}.{unknown}")));
            }
            let path = format!("{path}.messages");
            let turns = list(&path, object.get("messages").ok_or_else(|| missing(&path))?)?;
            let messages: Vec<Message> = turns
                .iter()
                .enumerate()
                .map(|(index, one)| turn(&format!("{path}[{index}]"), one))
                .collect::<Result<_>>()?;
            match messages.last() {
                Some(last) if last.role == "user" && !last.content.trim().is_empty() => {
                    Ok(PromptInput::Messages { messages })
                }
                Some(_) => {
                    let last = format!("{path}[{}]", messages.len() - 1);
                    Err(Error::invalid(last, "the last turn must be a user's, with text"))
                }
                None => Err(Error::invalid(path, "must have at least one turn")),
            }
        }
        _ => Err(Error::invalid(path, "must be a string or an object with `messages`")),
    }
}

fn turn(path: &str, value: &Value) -> Result<Message> {
    let object = object(value, path)?;
    for key in ["role", "content"] {
        let at = format!("{path}.{key}");
        field::<String>(&at, object.get(key).ok_or_else(|| missing(&at))?)?;
    }
    if let Some(unknown) = object.keys().find(|key| !matches!(key.as_str(), "role" | "content" | "name")) {
        return Err(unknown_field(&format!("{path}.{unknown}")));
    }
    let message: Message = field(path, value)?;
    match message.role.as_str() {
        "system" | "user" | "assistant" => Ok(message),
        other => {
            Err(Error::invalid(format!("{path}.role"), format!("`{other}` is not `system`, `user` or `assistant`")))
        }
    }
}

fn pair(path: &str, value: &Value) -> Result<PairInput> {
    let object = object(value, path)?;
    let at = |key: &str| format!("{path}.{key}");
    let known = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"];
    if let Some(unknown) = object.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(unknown_field(&at(unknown)));
    }
    let answer = |key: &str| -> Result<String> {
        let text: String = field(&at(key), object.get(key).ok_or_else(|| missing(&at(key)))?)?;
        if text.trim().is_empty() { Err(Error::invalid(at(key), "the answer is empty")) } else { Ok(text) }
    };
    let score = |key: &str| object.get(key).map_or(Ok(None), |value| field::<Option<f64>>(&at(key), value));
    let pair = PairInput {
        prompt: prompt(&at("prompt"), object.get("prompt").ok_or_else(|| missing(&at("prompt")))?)?,
        chosen: answer("chosen")?,
        rejected: answer("rejected")?,
        score_chosen: score("score_chosen")?,
        score_rejected: score("score_rejected")?,
    };
    match (pair.score_chosen, pair.score_rejected) {
        (Some(_), None) => Err(Error::invalid(at("score_rejected"), "give both scores or none")),
        (None, Some(_)) => Err(Error::invalid(at("score_chosen"), "give both scores or none")),
        _ => Ok(pair),
    }
}

/// A section whose fields all have defaults: each is read alone first, so that an error knows its field.
fn section<T: DeserializeOwned>(path: &str, value: &Value) -> Result<T> {
    for (key, value) in object(value, path)? {
        field_in::<T>(path, key, json!({ key.as_str(): value }))?;
    }
    field(path, value)
}

fn field_in<T: DeserializeOwned>(path: &str, key: &str, probe: Value) -> Result<()> {
    serde_json::from_value::<T>(probe).map(drop).map_err(|error| at(&format!("{path}.{key}"), &error))
}

fn field<T: DeserializeOwned>(path: &str, value: &Value) -> Result<T> {
    serde_json::from_value(value.clone()).map_err(|error| at(path, &error))
}

fn at(path: &str, error: &serde_json::Error) -> Error {
    let message = error.to_string();
    match message.starts_with("unknown field") {
        true => Error::new(Code::UnknownField, message).at(path),
        false => Error::invalid(path, message),
    }
}

fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| Error::invalid(path, "must be an object"))
}

fn list<'a>(path: &str, value: &'a Value) -> Result<&'a Vec<Value>> {
    value.as_array().ok_or_else(|| Error::invalid(path, "must be a list"))
}

fn missing(path: &str) -> Error {
    Error::invalid(path, "is missing")
}

fn unknown_field(path: &str) -> Error {
    Error::new(Code::UnknownField, format!("`{path}` is not a field of this request")).at(path)
}

fn within(path: &str, value: usize, low: usize, high: usize) -> Result<()> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(Error::invalid(path, format!("must be in {low}..={high}, not {value}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_what_is_left_out() {
        let request = JobRequest::parse(&json!({"prompts": ["Hi"], "training": {"epochs": 2}})).unwrap();
        assert_eq!(request.training.epochs, 2.0);
        assert_eq!(request.training.batch_size, JobRequest::default().training.batch_size);
        let again = JobRequest::parse(&serde_json::to_value(&request).unwrap()).unwrap();
        assert_eq!(again, request, "what is stored is read back as it was");
    }

    #[test]
    fn every_error_names_its_field() {
        let cases = [
            (json!([]), "body"),
            (json!({}), "prompts"),
            (json!({"prompts": []}), "prompts"),
            (json!({"prompts": ["a", " "]}), "prompts[1]"),
            (json!({"prompts": ["a"], "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}), "prompts"),
            (json!({"prompts": [{"messages": [{"role": 3, "content": "x"}]}]}), "prompts[0].messages[0].role"),
            (json!({"prompts": [{"messages": [{"role": "user"}]}]}), "prompts[0].messages[0].content"),
            (json!({"prompts": [{"messages": [{"role": "assistant", "content": "x"}]}]}), "prompts[0].messages[0]"),
            (json!({"prompts": ["a"], "promts": 1}), "promts"),
            (json!({"prompts": ["a"], "training": {"batch_size": "8"}}), "training.batch_size"),
            (json!({"prompts": ["a"], "training": {"batch_size": 0}}), "training.batch_size"),
            (json!({"prompts": ["a"], "training": {"batchsize": 8}}), "training.batchsize"),
            (json!({"prompts": ["a"], "loss": {"type": "dpoo"}}), "loss.type"),
            (json!({"prompts": ["a"], "synthesis": {"rounds": 9}}), "synthesis.rounds"),
            (json!({"prompts": ["a"], "publish": {"require": {"win_rate": "x"}}}), "publish.require.win_rate"),
            (json!({"prompts": ["a"], "publish": {"alias": "a/b"}}), "publish.alias"),
            (json!({"prompts": ["a"], "behavior": {"name": "x"}}), "behavior.principle"),
            (json!({"prompts": ["a"], "behavior": 3}), "behavior"),
            (json!({"prompts": ["a"], "seed": -1}), "seed"),
            (json!({"pairs": [{"prompt": "a", "chosen": "b"}]}), "pairs[0].rejected"),
            (
                json!({"pairs": [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1}]}),
                "pairs[0].score_rejected",
            ),
        ];
        for (body, path) in cases {
            let error = JobRequest::parse(&body).unwrap_err();
            assert_eq!((error.status(), error.param.as_deref()), (400, Some(path)), "{body}");
        }
        let unknown = JobRequest::parse(&json!({"prompts": ["a"], "lora": {"rank": 8}})).unwrap_err();
        assert_eq!((unknown.code, unknown.param.as_deref()), (Code::UnknownField, Some("lora.rank")));
    }

    #[test]
    fn an_inline_recipe_is_checked_to_its_leaves() {
        let good = json!({"name": "n", "principle": "p", "critique": "c", "revision": "r",
            "judge": {"prompt": "{prompt}{response}", "min": 1, "max": 5}});
        let parse = |recipe: &Value| JobRequest::parse(&json!({"prompts": ["a"], "behavior": recipe}));
        parse(&good).unwrap();
        let param = |change: &dyn Fn(&mut Value)| {
            let mut bad = good.clone();
            change(&mut bad);
            parse(&bad).unwrap_err().param.unwrap()
        };
        assert_eq!(param(&|v| v["judge"]["min"] = json!("low")), "behavior.judge.min");
        assert_eq!(param(&|v| v["judge"]["max"] = json!(0)), "behavior.judge.max");
        assert_eq!(param(&|v| v["judge"]["mode"] = json!("guess")), "behavior.judge.mode");
        assert_eq!(param(&|v| v["critique"] = json!("")), "behavior.critique");
    }
}
