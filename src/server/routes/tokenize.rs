//! `POST /tokenize` and `/detokenize`, as vLLM has them.

use actix_web::{HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::render_options;
use super::{Routes, resolve};
use crate::error::Error;
use crate::server::AppState;
use crate::server::messages::{ChatMessage, messages};
use crate::server::reply::{Reply, blocking, parse};
use crate::server::tools::{ChatTool, Offer, chat_functions};
use crate::text::RenderOptions;

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/tokenize", tokenize);
    routes.post("/detokenize", detokenize);
}

/// A text or a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// Whose tokenizer; `student` where it is left out.
    pub(crate) model: Option<String>,
    /// A text.
    pub(crate) prompt: Option<String>,
    /// Or a conversation.
    pub(crate) messages: Option<Vec<ChatMessage>>,
    /// BOS before a text (the default), or before what the template wrote.
    pub(crate) add_special_tokens: Option<bool>,
    /// Header of an assistant turn after a conversation (the default).
    pub(crate) add_generation_prompt: Option<bool>,
    /// Go on with the last message.
    pub(crate) continue_final_message: Option<bool>,
    /// Template instead of the model's; only where the server is started with `server.trust_request_chat_template`.
    pub(crate) chat_template: Option<String>,
    /// Tools the conversation may use.
    pub(crate) tools: Option<Vec<ChatTool>>,
    /// Extra variables of the template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Add the tokens' texts.
    pub(crate) return_token_strs: Option<bool>,
}

/// The tokens of a text.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Tokens {
    /// How many.
    count: usize,
    /// Longest prompt and answer together.
    max_model_len: usize,
    /// Their ids.
    tokens: Vec<u32>,
    /// Their texts, where asked for.
    #[schema(required)]
    token_strs: Option<Vec<String>>,
}

/// The text of tokens.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Text {
    /// The text.
    prompt: String,
}

async fn tokenize(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: TokenizeRequest = parse(&body)?;
    let target = resolve(&state, request.model.as_deref().unwrap_or("student")).await?;
    let tokenizer = target.tokenizer()?.clone();
    let tools = Offer::read(chat_functions(request.tools)?, None, None)?.shown();
    let words = tokenizer.clone();
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), None) => {
            blocking(move || words.encode(&prompt, request.add_special_tokens.unwrap_or(true))).await?
        }
        (None, Some(turns)) => {
            let (continues, header) = (request.continue_final_message, request.add_generation_prompt);
            let render = RenderOptions {
                kwargs: request.chat_template_kwargs.unwrap_or_default(),
                tools,
                ..render_options(&state.limits, request.chat_template, continues, header)?
            };
            let (turns, special) = (messages(&turns)?, request.add_special_tokens.unwrap_or(false));
            blocking(move || words.encode(&words.render(&turns, &render)?, special)).await?
        }
        _ => return Err(Error::invalid("prompt", "give either `prompt` or `messages`").into()),
    };
    let texts = request
        .return_token_strs
        .unwrap_or(false)
        .then(|| tokens.iter().map(|id| tokenizer.token_text(*id)).collect::<Vec<_>>());
    let max_model_len = target.max_model_len()?;
    Ok(HttpResponse::Ok().json(Tokens { count: tokens.len(), max_model_len, tokens, token_strs: texts }))
}

/// Token ids.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// Whose tokenizer; `student` where it is left out.
    pub(crate) model: Option<String>,
    /// The ids.
    pub(crate) tokens: Vec<u32>,
}

async fn detokenize(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: DetokenizeRequest = parse(&body)?;
    let target = resolve(&state, request.model.as_deref().unwrap_or("student")).await?;
    let tokenizer = target.tokenizer()?.clone();
    let text = blocking(move || {
        let limit = tokenizer.id_limit();
        if let Some(id) = request.tokens.iter().find(|id| **id >= limit) {
            return Err(Error::invalid("tokens", format!("token id {id} is outside the vocabulary of {limit}")));
        }
        tokenizer.decode(&request.tokens, false)
    });
    Ok(HttpResponse::Ok().json(Text { prompt: text.await? }))
}
