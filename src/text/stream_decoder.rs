//! Tokens to text while they come: no broken characters, stop strings found across token borders and held back.

use std::sync::Arc;

use super::Tokenizer;

/// State of one answer's text.
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    include_stop: bool,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Decoding starts here, so that a token is read with its left neighbours (spaces, byte runs).
    prefix: usize,
    /// Tokens before this are part of `held` or sent.
    read: usize,
    /// Certain characters that may begin a stop string.
    held: String,
}

impl StreamDecoder {
    /// `stop`: strings that end the text; they are cut off unless `include_stop`.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>, include_stop: bool, skip_special_tokens: bool) -> Self {
        StreamDecoder {
            tokenizer,
            stop,
            include_stop,
            skip_special_tokens,
            ids: Vec::new(),
            prefix: 0,
            read: 0,
            held: String::new(),
        }
    }

    /// Takes one token; returns the text that is now certain (maybe empty) and the stop string if one is complete.
    pub fn push(&mut self, id: u32) -> (String, Option<String>) {
        self.ids.push(id);
        let (before, after) = (self.text(self.prefix..self.read), self.text(self.prefix..self.ids.len()));
        // A trailing U+FFFD is a character whose other bytes are still to come.
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
            return (String::new(), None);
        }
        self.held.push_str(after.get(before.len()..).unwrap_or_default());
        (self.prefix, self.read) = (self.read, self.ids.len());
        self.release()
    }

    /// The text still held back when generation ends without a stop string.
    pub fn finish(&mut self) -> String {
        let (before, after) = (self.text(self.prefix..self.read), self.text(self.prefix..self.ids.len()));
        let mut text = std::mem::take(&mut self.held);
        text.push_str(after.get(before.len()..).unwrap_or_default());
        text
    }

    fn text(&self, range: std::ops::Range<usize>) -> String {
        self.tokenizer.decode(&self.ids[range], self.skip_special_tokens).unwrap_or_default()
    }

    /// Everything held up to a stop string, or up to where one may be beginning.
    fn release(&mut self) -> (String, Option<String>) {
        let found =
            self.stop.iter().filter_map(|stop| self.held.find(stop).map(|at| (at, stop))).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.include_stop { at + stop.len() } else { at });
            (self.prefix, self.read) = (self.ids.len(), self.ids.len());
            return (text, Some(stop));
        }
        let keep = self.stop.iter().map(|stop| longest_beginning(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`.
fn longest_beginning(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).rev().find(|at| text.ends_with(&stop[..*at])).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::TokenizerOptions;

    /// Every byte is a token of its own, as the byte alphabet writes it.
    fn bytes() -> Arc<Tokenizer> {
        let alphabet = |byte: u8| match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
            0xad => '\u{143}',
            _ => char::from_u32(0x121 + u32::from(byte - 0x7f)).unwrap(),
        };
        let vocab: serde_json::Map<_, _> =
            (0..=255u8).map(|byte| (alphabet(byte).to_string(), serde_json::json!(byte))).collect();
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let json = serde_json::json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let options = TokenizerOptions { tokenizer_json: json.to_string(), ..TokenizerOptions::default() };
        Arc::new(Tokenizer::new(options).unwrap())
    }

    fn run(tokenizer: &Arc<Tokenizer>, text: &str, stop: &[&str], include: bool) -> (Vec<String>, Option<String>) {
        let stop = stop.iter().map(ToString::to_string).collect();
        let mut decoder = StreamDecoder::new(tokenizer.clone(), stop, include, true);
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            let (piece, found) = decoder.push(u32::from(byte));
            pieces.push(piece);
            if found.is_some() {
                return (pieces, found);
            }
        }
        pieces.push(decoder.finish());
        (pieces, None)
    }

    #[test]
    fn characters_come_whole_and_possible_stops_are_held_back() {
        let tokenizer = bytes();
        assert_eq!(run(&tokenizer, "é!", &[], false).0, ["", "é", "!", ""]);
        assert_eq!(run(&tokenizer, "a<b", &["</s>"], false).0, ["a", "", "<b", ""]);
        let (pieces, found) = run(&tokenizer, "one</s>two", &["</s>"], false);
        assert_eq!((pieces.concat().as_str(), found.as_deref()), ("one", Some("</s>")));
        assert_eq!(run(&tokenizer, "one</s>two", &["</s>"], true).0.concat(), "one</s>");
    }

    proptest! {
        #[test]
        fn pieces_are_the_text_up_to_the_first_stop(text in "[ab<é🙂]{0,24}", stop in "[ab<é]{1,3}") {
            let (pieces, found) = run(&bytes(), &text, &[&stop], false);
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(pieces.concat(), expected);
            prop_assert_eq!(found.is_some(), text.contains(&stop));
        }
    }
}
