//! Tokens to text while they come: no broken characters, stop strings found across token borders and held back.

use std::sync::Arc;

use super::Tokenizer;

/// State of one answer's text.
pub struct StreamDecoder {}

impl StreamDecoder {
    /// `stop`: strings that end the text; they are cut off unless `include_stop`.
    pub fn new(
        _tokenizer: Arc<Tokenizer>,
        _stop: Vec<String>,
        _include_stop: bool,
        _skip_special_tokens: bool,
    ) -> Self {
        todo!()
    }

    /// Takes one token; returns the text that is now certain (maybe empty) and the stop string if one is complete.
    pub fn push(&mut self, _id: u32) -> (String, Option<String>) {
        todo!()
    }

    /// The text still held back when generation ends without a stop string.
    pub fn finish(&mut self) -> String {
        todo!()
    }
}
