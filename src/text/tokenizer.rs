//! The model's tokenizer with its special tokens and chat template.

use std::collections::HashSet;
use std::sync::OnceLock;

use llguidance::ParserFactory;
use serde_json::Value;

use super::chat_template::ChatTemplate;
use super::{Message, RenderOptions, ToolStyle, grammar, tools};
use crate::error::{Error, Result};

/// What a tokenizer is built from: everything as in Hugging Face's own files, also where it comes from a GGUF file.
#[derive(Clone, Debug, Default)]
pub struct TokenizerOptions {
    /// Text of `tokenizer.json`; made from the vocabulary in the metadata of a GGUF file.
    pub tokenizer_json: String,
    /// Jinja source of the chat template, if there is one.
    pub chat_template: Option<String>,
    /// Text of the BOS token, if there is one (templates name it).
    pub bos_token: Option<String>,
    /// Text of the EOS token.
    pub eos_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// Whether plain-text prompts get BOS in front.
    pub add_bos_token: bool,
    /// All ids that end generation (generation_config, config, the template's end of turn).
    pub eos_token_ids: Vec<u32>,
}

/// A tokenizer; immutable, shared.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    options: TokenizerOptions,
    bos_id: Option<u32>,
    /// Tokens that stand beside the model's vocabulary: their text is what they write.
    added: HashSet<u32>,
    /// Those of them that are special.
    special: HashSet<u32>,
    /// Byte-level alphabets write bytes as printable characters; sentencepiece writes `<0x0A>` and `▁`.
    byte_level: bool,
    /// One more than the largest id.
    id_limit: u32,
    /// Compiles grammars for this vocabulary; made when the first is asked for.
    grammars: OnceLock<Result<ParserFactory>>,
}

impl Tokenizer {
    /// Builds it; a template that does not parse is an error naming the template.
    pub fn new(options: TokenizerOptions) -> Result<Self> {
        let fail = |error: &dyn std::fmt::Display| {
            Error::unprocessable("tokenizer.json", format!("the tokenizer cannot be built: {error}"))
        };
        let json: Value = serde_json::from_str(&options.tokenizer_json).map_err(|error| fail(&error))?;
        let mut inner =
            tokenizers::Tokenizer::from_bytes(options.tokenizer_json.as_bytes()).map_err(|error| fail(&error))?;
        // Cutting and padding are the server's business.
        inner.with_truncation(None).map_err(|error| fail(&error))?;
        inner.with_padding(None);
        let beside = inner.get_added_tokens_decoder();
        let special = beside.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let added = beside.into_keys().collect();
        let template = options.chat_template.as_deref().map(ChatTemplate::new).transpose()?;
        let bos_id = options.bos_token.as_deref().and_then(|token| inner.token_to_id(token));
        let byte_level = json["decoder"].to_string().contains("ByteLevel");
        let id_limit = inner.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let grammars = OnceLock::new();
        Ok(Tokenizer { inner, template, options, bos_id, added, special, byte_level, id_limit, grammars })
    }

    /// Ids of plain text; `add_special_tokens` puts BOS in front where the model wants one (never twice).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| Error::invalid("prompt", format!("cannot be tokenized: {error}")))?;
        let mut ids = encoding.get_ids().to_vec();
        if add_special_tokens && let Some(bos) = self.bos_id {
            if self.options.add_bos_token && ids.first() != Some(&bos) {
                ids.insert(0, bos);
            }
            while ids.len() > 1 && ids[0] == bos && ids[1] == bos {
                ids.remove(0);
            }
        }
        Ok(ids)
    }

    /// Text of ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| Error::invalid("tokens", format!("cannot be decoded: {error}")))
    }

    /// The token as shown in logprobs (its own text; U+FFFD for part of a character).
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The token's UTF-8 bytes, which may be part of a character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.added.contains(&id) {
            return token.into_bytes();
        }
        if self.byte_level {
            // A character outside the byte alphabet can only come from a token added by hand.
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            return bytes.unwrap_or_else(|| token.into_bytes());
        }
        let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return vec![byte];
        }
        token.replace('▁', " ").into_bytes()
    }

    /// Whether the id is a special (control) token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The special token with this text.
    pub(super) fn special_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text).filter(|id| self.is_special(*id))
    }

    /// All ids that end generation (generation_config, config, the template's end of turn).
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.options.eos_token_ids
    }

    /// What it was built from.
    pub fn options(&self) -> &TokenizerOptions {
        &self.options
    }

    /// One more than the largest id: ids may have gaps.
    pub fn id_limit(&self) -> u32 {
        self.id_limit
    }

    pub(super) fn grammar_factory(&self) -> Result<&ParserFactory> {
        self.grammars.get_or_init(|| grammar::factory(self)).as_ref().map_err(Clone::clone)
    }

    /// Number of ids, counted anew each time: a check of an id wants [`Tokenizer::id_limit`].
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders a conversation; a 400 naming `messages` when the template refuses it.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::invalid("messages", "the conversation is empty"));
        }
        let own;
        let template = match (&options.template, &self.template) {
            (Some(source), _) => {
                own = ChatTemplate::new(source).map_err(|error| Error::invalid("chat_template", error.message))?;
                &own
            }
            (None, Some(template)) => template,
            (None, None) => {
                return Err(Error::invalid(
                    "messages",
                    "the model has no chat template: use /v1/completions or pass `chat_template`",
                ));
            }
        };
        let messages = tools::prepared(self.template_source(options), messages, options.tools.as_ref());
        template.render(&messages, options, self.options.bos_token.as_deref(), self.options.eos_token.as_deref())
    }

    /// How the model writes tool calls, as far as its template tells.
    pub fn tool_style(&self, options: &RenderOptions) -> ToolStyle {
        ToolStyle::of(self.template_source(options))
    }

    fn template_source<'a>(&'a self, options: &'a RenderOptions) -> &'a str {
        options.template.as_deref().or(self.options.chat_template.as_deref()).unwrap_or_default()
    }

    /// Renders and encodes a conversation, with no BOS beyond what the template wrote.
    pub fn encode_chat(&self, messages: &[Message], options: &RenderOptions) -> Result<Vec<u32>> {
        self.encode(&self.render(messages, options)?, false)
    }
}

/// The byte a character of GPT-2's byte alphabet stands for: printable Latin-1 is itself, the 68 others follow U+0100 in order.
fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = (0..0x144).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('a')), (Some(b' '), Some(b'\n'), Some(b'a')));
    }
}
