//! `POST /v1/completions`: text or token ids in, text out; `echo` with `max_tokens: 0` scores a given text.

use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{Routes, resolve};
use crate::engine::request::{Event, TokenLogprob, Usage};
use crate::error::{Error, Result};
use crate::roles::{Start, Target};
use crate::server::AppState;
use crate::server::answer::{self, Choices, Collected, Head};
use crate::server::forward::forward;
use crate::server::reply::{Reply, blocking, error_body, event, parse, sse};
use crate::server::sampling::{Refused, Sampling, StreamOptions};
use crate::text::Tokenizer;

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/completions", create);
}

/// One prompt or several, as text or token ids.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

/// Body of a text completion, besides the sampling fields.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    /// `teacher`, `student`, or an adapter's name.
    pub(crate) model: String,
    /// What to go on from.
    pub(crate) prompt: Prompt,
    /// Put the prompt before the answer.
    pub(crate) echo: Option<bool>,
    /// Log-probabilities with so many alternatives.
    #[schema(maximum = 5)]
    pub(crate) logprobs: Option<usize>,
    /// Put BOS before a text prompt where the model wants one (the default).
    pub(crate) add_special_tokens: Option<bool>,
}

/// OpenAI's default length of a text completion.
const DEFAULT_TOKENS: usize = 16;

async fn create(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: CompletionRequest = parse(&body)?;
    let sampling: Sampling = parse(&body)?;
    let n = sampling.n()?;
    let best_of = sampling.best_of(n)?;
    let target = resolve(&state, &request.model).await?;
    parse::<Refused>(&body)?.check(&target)?;
    let mut params = sampling.params(&target.defaults)?;
    let options = sampling.stream_options()?;
    if let Some(remote) = target.remote() {
        let stream = sampling.streams().then_some(options);
        return forward(&target, remote, Start::Text, parse(&body)?, stream, state.limits.request_timeout).await;
    }
    if request.logprobs.is_some_and(|top| top > 5) {
        return Err(Error::invalid("logprobs", "`logprobs` must be at most 5").into());
    }
    let tokenizer = target.tokenizer()?.clone();
    let special = request.add_special_tokens.unwrap_or(true);
    let encode = |texts: Vec<String>| {
        let words = tokenizer.clone();
        blocking(move || texts.iter().map(|text| words.encode(text, special)).collect::<Result<Vec<_>>>())
    };
    let echo = request.echo.unwrap_or(false);
    let given = match &request.prompt {
        Prompt::Text(text) if echo => vec![text.clone()],
        Prompt::Texts(texts) if echo => texts.clone(),
        _ => Vec::new(),
    };
    let mut prompts: Vec<Vec<u32>> = match request.prompt {
        Prompt::Text(text) => encode(vec![text]).await?,
        Prompt::Texts(texts) => encode(texts).await?,
        Prompt::Ids(ids) => vec![ids],
        Prompt::ManyIds(all) => all,
    };
    if prompts.is_empty() {
        return Err(Error::invalid("prompt", "`prompt` is empty").into());
    }
    params.max_tokens = Some(params.max_tokens.unwrap_or(DEFAULT_TOKENS));
    params.logprobs = request.logprobs;
    if echo && request.logprobs.is_some() {
        params.prompt_logprobs = request.logprobs.max(params.prompt_logprobs);
    }
    let mut echoed = Vec::new();
    for (at, prompt) in prompts.iter_mut().enumerate() {
        let whole = prompt.len();
        *prompt = sampling.truncate(std::mem::take(prompt), &target, &params)?;
        if echo {
            // As it was given: tokens would say what was put before it too.
            let text = given.get(at).filter(|_| prompt.len() == whole).cloned();
            echoed.push(text.map_or_else(|| tokenizer.decode(prompt, false), Ok)?);
        }
    }
    sampling.constrain(&tokenizer, sampling.asked()?, &mut params).await?;
    if sampling.streams() && echo && request.logprobs.is_some() {
        let text = "`echo` with `logprobs` cannot be streamed: they are read before the answer begins";
        return Err(Error::invalid("echo", text).into());
    }
    let ids = sampling.return_token_ids.unwrap_or(false);
    if best_of > n {
        params.logprobs = params.logprobs.or(Some(0));
    }
    let choices = Choices::submit(&target, &prompts, &params, best_of, state.limits.request_timeout)?;
    if sampling.streams() {
        return streamed(&target, choices, Ask { stream: options, ids, echoed, n, prompts });
    }
    let head = Head::new("cmpl-", "text_completion", &target);
    let all = answer::collect(choices, prompts.len() * best_of).await?;
    let usages: Vec<Usage> = all.iter().map(|choice| choice.usage).collect();
    let all = answer::best(all, best_of, n);
    let mut rendered = Vec::with_capacity(all.len());
    for (index, choice) in all.iter().enumerate() {
        // The first choice of a prompt has read it.
        let (prompt, read) = (&prompts[index / n], &all[index / n * n].prompt);
        let before = echoed.get(index / n).map_or("", String::as_str);
        let lists = |most: usize| {
            let mut lists = Lists { most, ..Lists::default() };
            if echo {
                lists.echo(&tokenizer, prompt, read, before);
            }
            lists.answer(&tokenizer, choice)
        };
        let mut body = json!({
            "index": index,
            "text": format!("{before}{}", choice.text),
            "logprobs": request.logprobs.map(lists),
            "finish_reason": choice.reason.as_ref().map(|reason| answer::finish_reason(reason, 0)),
            "stop_reason": choice.reason.as_ref().map_or(Value::Null, answer::stop_reason),
        });
        if ids {
            body["token_ids"] = json!(choice.ids);
            body["prompt_token_ids"] = json!(prompt);
        }
        if let Some(most) = sampling.prompt_logprobs {
            body["prompt_logprobs"] = answer::prompt_logprobs_json(&tokenizer, read, most);
        }
        rendered.push(body);
    }
    let usage = counted(&usages, best_of);
    Ok(head.headers(HttpResponse::Ok().json(head.body(json!({"choices": rendered, "usage": usage})))))
}

/// Every prompt counts once, every answer counts. `usages` are in the order of the choices, `n` of each prompt.
fn counted(usages: &[Usage], n: usize) -> Value {
    let firsts: Vec<&Usage> = usages.iter().step_by(n).collect();
    answer::counted(
        firsts.iter().map(|usage| usage.prompt_tokens).sum(),
        firsts.iter().map(|usage| usage.cached_tokens).sum(),
        usages.iter().map(|usage| usage.completion_tokens).sum(),
    )
}

/// The classic four lists, with `most` alternatives.
#[derive(Default)]
struct Lists {
    most: usize,
    tokens: Vec<String>,
    values: Vec<Option<f32>>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters before the answer.
    before: usize,
}

impl Lists {
    /// The prompt's tokens, which stand before the answer as `text`; `read`: what was read of them.
    fn echo(&mut self, tokenizer: &Tokenizer, ids: &[u32], read: &[Option<TokenLogprob>], text: &str) {
        self.before = text.chars().count();
        let mut at = 0;
        for (id, known) in ids.iter().zip(read.iter().map(Option::as_ref).chain(std::iter::repeat(None))) {
            self.push(tokenizer, *id, known, at);
            at = (at + tokenizer.token_text(*id).chars().count()).min(self.before);
        }
    }

    fn answer(mut self, tokenizer: &Tokenizer, choice: &Collected) -> Value {
        for (token, at) in choice.logprobs.iter().zip(&choice.offsets) {
            self.push(tokenizer, token.id, Some(token), self.before + at);
        }
        json!({"tokens": self.tokens, "token_logprobs": self.values, "top_logprobs": self.top, "text_offset": self.offsets})
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: u32, known: Option<&TokenLogprob>, at: usize) {
        self.offsets.push(at);
        self.tokens.push(tokenizer.token_text(id));
        self.values.push(known.map(|token| answer::floor(token.logprob)));
        self.top.push(known.map_or(Value::Null, |token| {
            // The token itself is always among them.
            let all = token.top.iter().take(self.most).copied().chain([(id, token.logprob)]);
            Value::Object(all.map(|(id, logprob)| (tokenizer.token_text(id), json!(answer::floor(logprob)))).collect())
        }));
    }
}

/// What a request asks of a stream.
struct Ask {
    stream: StreamOptions,
    ids: bool,
    /// The text of each prompt, where it stands before the answers.
    echoed: Vec<String>,
    n: usize,
    prompts: Vec<Vec<u32>>,
}

fn streamed(target: &Target, mut choices: Choices, ask: Ask) -> Reply {
    let head = Head::new("cmpl-", "text_completion", target);
    let named = head.clone();
    let tokenizer = target.tokenizer()?.clone();
    let chunks = async_stream::stream! {
        let mut usages = vec![Usage::default(); ask.prompts.len() * ask.n];
        for (index, usage) in usages.iter_mut().enumerate() {
            usage.prompt_tokens = ask.prompts[index / ask.n].len();
        }
        let chunk = |choice: Value, usages: &[Usage]| {
            let mut fields = json!({"choices": [choice]});
            if ask.stream.include_usage {
                fields["usage"] = if ask.stream.continuous_usage_stats { counted(usages, ask.n) } else { Value::Null };
            }
            event(&head.body(fields))
        };
        let mut lengths = vec![0; usages.len()];
        let opening = if !ask.echoed.is_empty() || ask.ids { usages.len() } else { 0 };
        for index in 0..opening {
            let prompt = &ask.prompts[index / ask.n];
            let text = ask.echoed.get(index / ask.n).map_or("", String::as_str);
            let mut choice = json!({"index": index, "text": text, "logprobs": null, "finish_reason": null});
            if ask.ids {
                choice["prompt_token_ids"] = json!(prompt);
            }
            yield chunk(choice, &usages);
        }
        while let Some((index, next)) = choices.next().await {
            let choice = match next {
                Event::Token { id, text, logprob } => {
                    usages[index].completion_tokens += 1;
                    let at = lengths[index];
                    lengths[index] += text.chars().count();
                    if text.is_empty() && logprob.is_none() && !ask.ids {
                        continue;
                    }
                    let logprobs = logprob.map(|token| {
                        let one = Collected { logprobs: vec![token], offsets: vec![at], ..Collected::default() };
                        Lists { most: usize::MAX, ..Lists::default() }.answer(&tokenizer, &one)
                    });
                    let mut choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null});
                    if ask.ids {
                        choice["token_ids"] = json!([id]);
                    }
                    choice
                }
                Event::Done { text, reason, usage } => {
                    usages[index] = usage;
                    json!({"index": index, "text": text, "logprobs": null, "finish_reason": answer::finish_reason(&reason, 0),
                        "stop_reason": answer::stop_reason(&reason)})
                }
                Event::Failed(error) => {
                    yield event(&error_body(&error));
                    return;
                }
                Event::Prompt(_) | Event::NextToken(..) | Event::Score(..) => continue,
            };
            yield chunk(choice, &usages);
        }
        if ask.stream.include_usage {
            yield event(&head.body(json!({"choices": [], "usage": counted(&usages, ask.n)})));
        }
        yield web::Bytes::from_static(b"data: [DONE]\n\n");
    };
    Ok(named.headers(sse(chunks)))
}
