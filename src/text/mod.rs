//! Text and token ids: tokenizer, chat template, grammars, streaming decoder. Knows no tensor and no file.

mod chat_template;
mod grammar;
mod stream_decoder;
mod tokenizer;
mod tools;

pub use chat_template::{Message, RenderOptions};
pub use grammar::{Constraint, Grammar, Matcher, TokenMask};
pub use stream_decoder::StreamDecoder;
pub use tokenizer::{Tokenizer, TokenizerOptions};
pub use tools::{Besides, CallReader, Offered, Said, ToolCall, ToolStyle, call_grammar};
