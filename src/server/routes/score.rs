//! `POST /v1/score`: the reward role's opinion of given answers.

use actix_web::{HttpResponse, web};
use futures_util::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Routes, TokensUsed, resolve, unix_now};
use crate::error::{Error, Result};
use crate::rdpo::{find_behavior, parse_behavior};
use crate::server::AppState;
use crate::server::limits::within;
use crate::server::messages::{ChatMessage, messages};
use crate::server::reply::{Reply, parse};
use crate::text::Message;

/// Most answers of one request.
const MOST: usize = 1024;

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/score", score);
    routes.post("/score", score);
}

/// One text, or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Texts {
    fn list(self) -> Vec<String> {
        match self {
            Texts::One(text) => vec![text],
            Texts::Many(texts) => texts,
        }
    }
}

/// A prompt and answers to it, a conversation that ends in an answer, or vLLM's two lists.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScoreRequest {
    /// The reward role; `reward` where it is left out.
    pub(crate) model: Option<String>,
    /// What was asked.
    pub(crate) prompt: Option<String>,
    /// Or the conversation so far; without `response` its last turn is scored.
    pub(crate) messages: Option<Vec<ChatMessage>>,
    /// The answer.
    pub(crate) response: Option<String>,
    /// Or several answers to the same prompt.
    pub(crate) responses: Option<Vec<String>>,
    /// Prompts, as vLLM names them: one, or as many as `text_2` has.
    #[serde(alias = "queries")]
    pub(crate) text_1: Option<Texts>,
    /// Answers, as vLLM names them.
    #[serde(alias = "documents")]
    pub(crate) text_2: Option<Texts>,
    /// Whose rubric a judge is asked with: a name or a recipe.
    #[schema(value_type = Option<Object>)]
    pub(crate) behavior: Option<Value>,
}

/// The score of one answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ScoreOf {
    /// Which answer, from 0.
    index: usize,
    /// `score`.
    object: &'static str,
    /// The score, on the scale of the reward.
    score: f64,
}

/// The scores, in the order of the answers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Scores {
    /// `score-…`.
    id: String,
    /// `list`.
    object: &'static str,
    /// Unix seconds.
    created: u64,
    /// The reward role.
    model: String,
    /// The scores.
    data: Vec<ScoreOf>,
    /// Tokens spent.
    usage: TokensUsed,
}

impl ScoreRequest {
    /// The conversations to score, each ending in the assistant's turn.
    fn conversations(self) -> Result<Vec<Vec<Message>>> {
        let before = match (self.prompt, self.messages, self.text_1) {
            (Some(prompt), None, None) => vec![Message::new("user", prompt)],
            (None, Some(turns), None) => messages(&turns)?,
            (None, None, Some(prompts)) => {
                let answers = self.text_2.ok_or_else(|| Error::invalid("text_2", "is missing"))?.list();
                if self.response.is_some() || self.responses.is_some() {
                    return Err(Error::invalid("text_2", "give the answers as `text_2` only"));
                }
                return by_pairs(&prompts.list(), answers);
            }
            _ => return Err(Error::invalid("prompt", "give one of `prompt`, `messages` and `text_1`")),
        };
        if self.text_2.is_some() {
            return Err(Error::invalid("text_2", "goes with `text_1`"));
        }
        let answers = match (self.response, self.responses) {
            (Some(one), None) => vec![one],
            (None, Some(many)) => many,
            (Some(_), Some(_)) => return Err(Error::invalid("responses", "give either `response` or `responses`")),
            (None, None) if before.last().is_some_and(|last| last.role == "assistant") => return Ok(vec![before]),
            (None, None) => return Err(Error::invalid("response", "is missing: there is no answer to score")),
        };
        count("responses", answers.len())?;
        let with = |answer: String| before.iter().cloned().chain([Message::new("assistant", answer)]).collect();
        Ok(answers.into_iter().map(with).collect())
    }
}

fn by_pairs(prompts: &[String], answers: Vec<String>) -> Result<Vec<Vec<Message>>> {
    count("text_2", answers.len())?;
    if prompts.len() != 1 && prompts.len() != answers.len() {
        let text = format!("has {} entries: give one, or as many as `text_2` ({})", prompts.len(), answers.len());
        return Err(Error::invalid("text_1", text));
    }
    let pair = |(prompt, answer): (&String, String)| {
        vec![Message::new("user", prompt.clone()), Message::new("assistant", answer)]
    };
    Ok(prompts.iter().cycle().zip(answers).map(pair).collect())
}

fn count(field: &str, given: usize) -> Result<()> {
    match given {
        0 => Err(Error::invalid(field, "is empty: there is no answer to score")),
        1..=MOST => Ok(()),
        _ => Err(Error::invalid(field, format!("has {given} entries; at most {MOST} are scored at once"))),
    }
}

async fn score(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let mut request: ScoreRequest = parse(&body)?;
    let model = request.model.take().unwrap_or_else(|| "reward".into());
    let reward = resolve(&state, &model)
        .await?
        .reward
        .ok_or_else(|| Error::invalid("model", format!("`{model}` does not score; the role that does is `reward`")))?;
    let recipe = match request.behavior.take() {
        Some(asked) => Some(find_behavior(&state.roles, &parse_behavior(&asked)?)?),
        None => None,
    };
    let rubric = recipe.as_ref().map(|recipe| &recipe.judge);
    let conversations = request.conversations()?;
    let reward = &reward;
    let asked = conversations.iter().enumerate().map(|(index, turns)| async move {
        reward.score(turns, rubric).await.map_err(|error| error.context(format!("answer {index}")))
    });
    let at_once = state.roles.max_in_flight(reward.target());
    let work = futures_util::stream::iter(asked).buffered(at_once).try_collect();
    let scores: Vec<_> = within(state.limits.request_timeout, work).await?;
    let prompt: usize = scores.iter().map(|score| score.prompt_tokens).sum();
    let completion: usize = scores.iter().map(|score| score.completion_tokens).sum();
    let data = scores.iter().enumerate().map(|(index, score)| ScoreOf { index, object: "score", score: score.value });
    Ok(HttpResponse::Ok().json(Scores {
        id: format!("score-{}", uuid::Uuid::new_v4().simple()),
        object: "list",
        created: unix_now(),
        model,
        data: data.collect(),
        usage: TokensUsed::new(prompt, completion),
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Vec<Vec<Message>>> {
        parse::<ScoreRequest>(&web::Bytes::from(body.to_string()))?.conversations()
    }

    #[test]
    fn every_shape_becomes_conversations() {
        let many = read(json!({"prompt": "p", "responses": ["a", "b"]})).unwrap();
        assert_eq!(many.len(), 2);
        assert_eq!((many[1][0].content.as_str(), many[1][1].content.as_str()), ("p", "b"));
        let turns = json!([{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(read(json!({"messages": turns})).unwrap(), read(json!({"prompt": "p", "response": "a"})).unwrap());
        let broadcast = read(json!({"text_1": "p", "text_2": ["a", "b"]})).unwrap();
        assert_eq!(broadcast, many);
        assert_eq!(read(json!({"text_1": ["p", "q"], "text_2": ["a", "b"]})).unwrap()[1][0].content, "q");
    }

    #[test]
    fn errors_name_the_field() {
        let param = |body: Value| read(body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"response": "a"})), "prompt");
        assert_eq!(param(json!({"prompt": "p"})), "response");
        assert_eq!(param(json!({"prompt": "p", "responses": []})), "responses");
        assert_eq!(param(json!({"prompt": "p", "response": "a", "responses": ["b"]})), "responses");
        assert_eq!(param(json!({"text_1": ["p", "q"], "text_2": ["a", "b", "c"]})), "text_1");
        assert_eq!(param(json!({"text_1": "p"})), "text_2");
        assert_eq!(param(json!({"prompt": "p", "response": "a", "text_2": "b"})), "text_2");
        assert_eq!(param(json!({"prompt": "p", "respons": "a"})), "respons");
    }
}
