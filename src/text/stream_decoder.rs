//! Tokens to text while they come: no broken characters, stop strings found across token borders and held back.

use std::sync::Arc;

use super::Tokenizer;

/// Tokens without a character of their own that are waited with; a character has four bytes.
const MOST_PENDING: usize = 8;
/// Tokens of the prompt that the first tokens of the answer are read with.
const CONTEXT: usize = 6;

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
    /// Bytes of `held` that came while nothing was a stop string.
    exempt: usize,
}

impl StreamDecoder {
    /// `prompt`: what the answer goes on from; SentencePiece takes the space off what a text begins with, which an answer does not.
    /// `stop`: strings that end the text; they are cut off unless `include_stop`.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        prompt: &[u32],
        stop: Vec<String>,
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        let read = ids.len();
        let mut decoder = StreamDecoder {
            tokenizer,
            stop,
            include_stop,
            skip_special_tokens,
            ids,
            prefix: 0,
            read,
            held: String::new(),
            exempt: 0,
        };
        // Half a character would change with the answer's first byte: what came before could not be told from it.
        if decoder.text(0..read).ends_with('\u{fffd}') {
            (decoder.ids, decoder.read) = (Vec::new(), 0);
        }
        decoder
    }

    /// Takes one token; returns the text that is now certain (maybe empty) and the stop string if one ends in what came with it.
    /// Nothing is a stop string unless `may_stop`.
    pub fn push(&mut self, id: u32, may_stop: bool) -> (String, Option<String>) {
        // It has no text. Were it kept, a long run of such tokens would be read again at each of them.
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return (String::new(), None);
        }
        self.ids.push(id);
        let new = self.unread();
        // A trailing U+FFFD is a character whose other bytes are still to come, where they can be. What never becomes one would be read
        // again at each token.
        let waits = new.is_empty() || new.ends_with('\u{fffd}');
        if waits && self.ids.len() - self.read < MOST_PENDING {
            return (String::new(), None);
        }
        self.held.push_str(&new);
        (self.prefix, self.read) = (if waits { self.ids.len() - 1 } else { self.read }, self.ids.len());
        self.release(may_stop)
    }

    /// The text still held back when generation ends, and the stop string if one is in it, before a character that is not whole.
    pub fn finish(&mut self, may_stop: bool) -> (String, Option<String>) {
        let new = self.unread();
        self.held.push_str(&new);
        let (mut text, stop) = self.release(may_stop);
        text.push_str(&std::mem::take(&mut self.held));
        (text, stop)
    }

    /// What the tokens that are not read yet add to the text.
    fn unread(&self) -> String {
        let (before, mut after) = (self.text(self.prefix..self.read), self.text(self.prefix..self.ids.len()));
        if after.starts_with(&before) {
            return after.split_off(before.len());
        }
        // A byte that is part of no character takes the bytes before it along (the decoder `ByteFallback`), which are sent already.
        self.text(self.read..self.ids.len())
    }

    fn text(&self, range: std::ops::Range<usize>) -> String {
        self.tokenizer.decode(&self.ids[range], self.skip_special_tokens).unwrap_or_default()
    }

    /// Everything held up to a stop string, or up to where one may be beginning.
    fn release(&mut self, may_stop: bool) -> (String, Option<String>) {
        // One that ended too early does not count later either.
        self.exempt = if may_stop { self.exempt } else { self.held.len() };
        let ends_late = |stop: &&String| {
            let found = self.held.match_indices(stop.as_str()).map(|(at, _)| at);
            found.into_iter().find(|at| at + stop.len() > self.exempt)
        };
        let stops = self.stop.iter().filter(|_| may_stop);
        let found = stops.filter_map(|stop| Some((ends_late(&stop)?, stop))).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.include_stop { at + stop.len() } else { at });
            (self.prefix, self.read) = (self.ids.len(), self.ids.len());
            return (text, Some(stop));
        }
        let keep = self.stop.iter().map(|stop| longest_beginning(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        self.exempt = self.exempt.saturating_sub(self.held.len());
        (std::mem::replace(&mut self.held, rest), None)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`. Only ends of `text` are tried, which is short: stop strings may be long.
fn longest_beginning(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    let mut ends = (text.len() - longest..text.len()).filter_map(|at| text.get(at..));
    ends.find(|end| stop.starts_with(end)).map_or(0, str::len)
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
        let mut decoder = StreamDecoder::new(tokenizer.clone(), &[], stop, include, true);
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            let (piece, found) = decoder.push(u32::from(byte), true);
            pieces.push(piece);
            if found.is_some() {
                return (pieces, found);
            }
        }
        let (piece, found) = decoder.finish(true);
        pieces.push(piece);
        (pieces, found)
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

    #[test]
    fn the_longest_end_that_begins_a_stop_string_is_held_back() {
        for (text, stop, held) in [
            ("", "ab", 0),
            ("ab", "ab", 0),
            ("xa", "ab", 1),
            ("aaa", "aab", 2),
            ("xabab", "ababc", 4),
            ("ab", "abababab", 2),
            ("xé", "éa", 2),
            ("aé", "é", 0),
            ("🙂é", "é🙂é!", 2),
            ("é🙂", "é🙂é!", 6),
            ("a", "", 0),
        ] {
            assert_eq!(longest_beginning(text, stop), held, "{text:?} {stop:?}");
        }
    }

    #[test]
    fn a_stop_string_counts_where_it_ends() {
        let mut decoder = StreamDecoder::new(bytes(), &[], vec!["ab".into()], false, true);
        let mut push = |byte: u8, may_stop| decoder.push(u32::from(byte), may_stop);
        assert_eq!(push(b'a', false), (String::new(), None), "it may be the beginning of one that ends later");
        assert_eq!(push(b'b', false), ("ab".into(), None));
        assert_eq!(push(b'a', false), (String::new(), None));
        assert_eq!(push(b'b', true), (String::new(), Some("ab".into())));
    }

    #[test]
    fn a_stop_string_before_half_a_character_is_found_at_the_end() {
        let word = Arc::new(
            Tokenizer::new(TokenizerOptions {
                tokenizer_json: serde_json::json!({"version": "1.0", "added_tokens": [],
                "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
                "model": {"type": "BPE", "vocab": {"Ġ": 0, "â": 1, "a": 2, "Ġâ": 3}, "merges": [["Ġ", "â"]]}})
                .to_string(),
                ..TokenizerOptions::default()
            })
            .unwrap(),
        );
        let mut decoder = StreamDecoder::new(word, &[], vec![" ".into()], false, true);
        assert_eq!(decoder.push(2, true), ("a".into(), None));
        assert_eq!(decoder.push(3, true), (String::new(), None), "half a character is still to come");
        assert_eq!(decoder.finish(true), (String::new(), Some(" ".into())));
    }

    /// A vocabulary as SentencePiece models have it: the text's first space is the tokenizer's own.
    fn sentences(strips: bool) -> Arc<Tokenizer> {
        let words = ["<s>", "</s>", "▁The", "▁capital", "▁is", "▁Paris", ".", "<0xC3>", "<0xA9>", "▁"];
        let vocab: serde_json::Map<_, _> =
            words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), serde_json::json!(id))).collect();
        let added = |id: usize| {
            serde_json::json!({"id": id, "content": words[id], "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
        };
        let llama = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let metaspace =
            serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let json = serde_json::json!({"version": "1.0", "added_tokens": [added(0), added(1)],
            "decoder": if strips { llama } else { metaspace }, "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let options = TokenizerOptions { tokenizer_json: json.to_string(), ..TokenizerOptions::default() };
        Arc::new(Tokenizer::new(options).unwrap())
    }

    /// The text of an answer to a prompt.
    fn answer(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], skip: bool) -> String {
        let mut decoder = StreamDecoder::new(tokenizer.clone(), prompt, Vec::new(), false, skip);
        let mut text: String = ids.iter().map(|id| decoder.push(*id, true).0).collect();
        text.push_str(&decoder.finish(true).0);
        text
    }

    #[test]
    fn an_answer_keeps_the_space_it_begins_with() {
        for tokenizer in [sentences(true), sentences(false)] {
            for prompt in [&[2, 3, 4][..], &[0, 2, 3, 2, 3, 2, 3, 4]] {
                assert_eq!(answer(&tokenizer, prompt, &[5, 6], true), " Paris.", "after {prompt:?}");
            }
            assert_eq!(answer(&tokenizer, &[], &[5, 6], true), "Paris.", "where it is the whole text");
            assert_eq!(answer(&tokenizer, &[0], &[5, 6], true), "Paris.", "special tokens are no text");
            assert_eq!(answer(&tokenizer, &[2], &[9, 6, 5], true), " . Paris");
        }
        assert_eq!(answer(&sentences(true), &[0], &[5, 6], false), " Paris.", "unless they are shown");
    }

    #[test]
    fn a_prompt_that_ends_within_a_character_is_not_read_again() {
        let tokenizer = sentences(true);
        assert_eq!(answer(&tokenizer, &[2, 7], &[8, 6], true), "\u{fffd}.");
        assert_eq!(answer(&tokenizer, &[2], &[7, 8, 6], true), "é.");
        let [prompt, half] = ["Caf", "Caf\u{c3}"].map(|text| text.chars().map(u32::from).collect::<Vec<_>>());
        assert_eq!(answer(&bytes(), &prompt, &[0xc3, 0xa9, 0x21], true), "é!");
        assert_eq!(answer(&bytes(), &half, &[0xa9, 0x21], true), "\u{fffd}!");
    }

    #[test]
    fn a_byte_of_no_character_takes_no_other_text_along() {
        assert_eq!(answer(&sentences(true), &[2], &[7, 8, 7, 5], true), "é\u{fffd} Paris");
        // Nor is a run of them waited with for ever.
        let mut decoder = StreamDecoder::new(bytes(), &[], Vec::new(), false, true);
        let pieces: Vec<usize> = (0..16).map(|_| decoder.push(0xc3, true).0.chars().count()).collect();
        assert_eq!((pieces[7], pieces.iter().sum::<usize>()), (8, 16));
    }

    #[test]
    fn a_stop_string_that_ended_too_early_does_not_end_the_answer_later() {
        for (third, text, found) in [(b'x', "abx", None), (b'c', "", Some("abc"))] {
            let stop = vec!["ab".into(), "abc".into()];
            let mut decoder = StreamDecoder::new(bytes(), &[], stop, false, true);
            let mut said = String::new();
            for (byte, may_stop) in [(b'a', false), (b'b', false)] {
                said += &decoder.push(u32::from(byte), may_stop).0;
            }
            let (piece, stopped) = decoder.push(u32::from(third), true);
            assert_eq!((said + &piece, stopped.as_deref()), (text.to_owned(), found));
        }
    }

    proptest! {
        #[test]
        fn a_prompt_changes_nothing_of_bytes(prompt in "[ab é🙂]{0,9}", cut in 0usize..9, text in "[ab é🙂]{0,9}") {
            let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
            let (prompt, tokenizer) = (ids(&prompt), bytes());
            let prompt = &prompt[..prompt.len().saturating_sub(cut)];
            prop_assert_eq!(answer(&tokenizer, prompt, &ids(&text), true), text);
        }

        #[test]
        fn pieces_are_the_text_up_to_the_first_stop(text in "[ab<é🙂]{0,24}", stop in "[ab<é]{1,3}") {
            let (pieces, found) = run(&bytes(), &text, &[&stop], false);
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(pieces.concat(), expected);
            prop_assert_eq!(found.is_some(), text.contains(&stop));
        }
    }
}
