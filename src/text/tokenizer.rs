//! The model's tokenizer with its special tokens and chat template.

use super::{Message, RenderOptions};
use crate::error::Result;

/// What a tokenizer is built from, in Hugging Face's forms.
#[derive(Clone, Debug)]
pub struct TokenizerOptions {
    /// Text of `tokenizer.json`.
    pub tokenizer_json: String,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// BOS text.
    pub bos_token: Option<String>,
    /// EOS text.
    pub eos_token: Option<String>,
    /// Padding text.
    pub pad_token: Option<String>,
    /// Whether plain-text prompts get BOS in front.
    pub add_bos_token: bool,
    /// Ids that end generation.
    pub eos_token_ids: Vec<u32>,
}

/// A tokenizer; immutable, shared.
pub struct Tokenizer {}

impl Tokenizer {
    /// Builds it; a template that does not parse is an error naming the template.
    pub fn new(_options: TokenizerOptions) -> Result<Self> {
        todo!()
    }

    /// Ids of plain text; `add_special_tokens` puts BOS in front where the model wants one (never twice).
    pub fn encode(&self, _text: &str, _add_special_tokens: bool) -> Result<Vec<u32>> {
        todo!()
    }

    /// Text of ids.
    pub fn decode(&self, _ids: &[u32], _skip_special_tokens: bool) -> Result<String> {
        todo!()
    }

    /// The token as shown in logprobs (its own text; U+FFFD for part of a character).
    pub fn token_text(&self, _id: u32) -> String {
        todo!()
    }

    /// The token's UTF-8 bytes, which may be part of a character.
    pub fn token_bytes(&self, _id: u32) -> Vec<u8> {
        todo!()
    }

    /// Whether the id is a special (control) token.
    pub fn is_special(&self, _id: u32) -> bool {
        todo!()
    }

    /// Ids that end generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        todo!()
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        todo!()
    }

    /// Renders a conversation; a 400 naming `messages` when the template refuses it.
    pub fn render(&self, _messages: &[Message], _options: &RenderOptions) -> Result<String> {
        todo!()
    }

    /// Renders and encodes a conversation, with no BOS beyond what the template wrote.
    pub fn encode_chat(&self, _messages: &[Message], _options: &RenderOptions) -> Result<Vec<u32>> {
        todo!()
    }
}
