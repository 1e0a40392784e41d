//! An answer read while it comes: what is text, what is a call.

use std::collections::HashMap;

use serde_json::value::RawValue;

use super::ToolStyle;

/// A call the model makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// Its arguments: the text of a JSON object.
    pub arguments: String,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Text for the reader.
    Text(String),
    /// A call, whole: what turns out not to be one must still be text, so nothing of it is given out before its end.
    Call(ToolCall),
}

/// What the JSON at the beginning of a text is.
enum Json<'a> {
    Whole(&'a RawValue, usize),
    Unfinished,
    Wrong,
}

/// State of one answer. White space around calls belongs to nobody and is dropped.
#[derive(Clone, Debug)]
pub struct CallReader {
    style: Option<ToolStyle>,
    /// Functions there are: JSON without a mark is a call only of one of these.
    names: Vec<String>,
    /// Calls to give out; what is called beyond is dropped.
    most: usize,
    calls: usize,
    held: String,
    /// Text was given out, so JSON without a mark is no call any more.
    spoke: bool,
    /// No text has come since the last call.
    after_call: bool,
    /// A call's closing mark is to come.
    closing: bool,
}

impl CallReader {
    /// Where no tools are offered: all is text.
    pub fn plain() -> Self {
        CallReader {
            style: None,
            names: Vec::new(),
            most: 0,
            calls: 0,
            held: String::new(),
            spoke: false,
            after_call: false,
            closing: false,
        }
    }

    /// Reads calls of the functions `names`, at most `most` of them.
    pub fn new(style: ToolStyle, names: Vec<String>, most: usize) -> Self {
        CallReader { style: Some(style), names, most, ..CallReader::plain() }
    }

    /// Calls given out so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes more text; returns what is now certain.
    pub fn push(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        self.read(false)
    }

    /// What is left when the answer ends.
    pub fn finish(&mut self) -> Vec<Said> {
        self.read(true)
    }

    fn read(&mut self, end: bool) -> Vec<Said> {
        let mut said = Vec::new();
        let Some(style) = self.style else {
            self.say(self.held.len(), &mut said);
            return said;
        };
        let (open, close) = style.marks();
        loop {
            if self.closing {
                let rest = self.held.trim_start();
                match rest.strip_prefix(close) {
                    Some(after) => self.held = after.to_owned(),
                    None if close.starts_with(rest) && end => self.held.clear(),
                    None if close.starts_with(rest) => return said,
                    None => {}
                }
                self.closing = false;
            }
            let Some((at, mark)) = self.opening(style, open) else { break };
            // The white space stays with the mark until it is known what the mark begins.
            let before = self.held[..at].trim_end_matches(|c| self.separates(c)).len();
            self.say(before, &mut said);
            let at = at - before;
            match json_at(&self.held[at + mark..]) {
                Json::Unfinished if !end => return said,
                Json::Whole(value, length) => match calls_in(value, (mark == 0).then_some(&self.names)) {
                    Some(calls) => {
                        self.held.drain(..at + mark + length);
                        let room = self.most.saturating_sub(self.calls);
                        said.extend(calls.into_iter().take(room).map(Said::Call).inspect(|_| self.calls += 1));
                        (self.after_call, self.closing) = (true, !close.is_empty());
                    }
                    None => self.say(at + mark.max(1), &mut said),
                },
                Json::Unfinished | Json::Wrong => self.say(at + mark.max(1), &mut said),
            }
        }
        let blank = self.held.chars().all(|c| self.separates(c));
        if end && blank && self.after_call {
            self.held.clear();
        }
        self.say(self.held.len() - if end { 0 } else { self.possible(open) }, &mut said);
        said
    }

    /// Where a call may begin, and how long its mark is.
    fn opening(&self, style: ToolStyle, open: &str) -> Option<(usize, usize)> {
        let lead = self.held.len() - self.held.trim_start_matches(|c| self.separates(c)).len();
        if style == ToolStyle::Llama && !self.spoke && self.held[lead..].starts_with('{') {
            return Some((lead, 0));
        }
        self.held.find(open).map(|at| (at, open.len()))
    }

    /// White space, and between two of Llama's calls a semicolon.
    fn separates(&self, c: char) -> bool {
        c.is_whitespace() || (c == ';' && self.style == Some(ToolStyle::Llama) && self.calls > 0 && !self.spoke)
    }

    /// Bytes at the end of what is held that may turn out to stand before a call: a beginning of its mark and the space before it.
    fn possible(&self, open: &str) -> usize {
        let begun = (1..open.len()).rev().find(|length| self.held.ends_with(&open[..*length])).unwrap_or(0);
        let before = &self.held[..self.held.len() - begun];
        begun + before.len() - before.trim_end_matches(|c| self.separates(c)).len()
    }

    /// Gives out the first `length` bytes as text.
    fn say(&mut self, length: usize, said: &mut Vec<Said>) {
        if length > 0 {
            let text: String = self.held.drain(..length).collect();
            if !text.trim().is_empty() {
                (self.spoke, self.after_call) = (true, false);
            }
            match said.last_mut() {
                Some(Said::Text(last)) => last.push_str(&text),
                _ => said.push(Said::Text(text)),
            }
        }
    }
}

fn json_at(text: &str) -> Json<'_> {
    match text.trim_start().chars().next() {
        None => return Json::Unfinished,
        Some('{' | '[') => {}
        Some(_) => return Json::Wrong,
    }
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    match values.next() {
        Some(Ok(value)) => Json::Whole(value, values.byte_offset()),
        // A number that is cut there is not told from a wrong one.
        Some(Err(error)) if !error.is_eof() && !text.ends_with(['-', '+', '.', 'e', 'E']) => Json::Wrong,
        _ => Json::Unfinished,
    }
}

/// The calls a value stands for: one, or a list of them. `of`: the functions there are, where the value could be anything.
fn calls_in(value: &RawValue, of: Option<&Vec<String>>) -> Option<Vec<ToolCall>> {
    if value.get().starts_with('[') {
        let all: Vec<&RawValue> = serde_json::from_str(value.get()).ok().filter(|all: &Vec<_>| !all.is_empty())?;
        return all.into_iter().map(|value| call_in(value, of)).collect();
    }
    Some(vec![call_in(value, of)?])
}

/// Arguments are passed on as they are written, so that no number is rounded on its way.
fn call_in(value: &RawValue, of: Option<&Vec<String>>) -> Option<ToolCall> {
    let fields: HashMap<String, &RawValue> = serde_json::from_str(value.get()).ok()?;
    let name: String = serde_json::from_str(fields.get("name")?.get()).ok()?;
    if name.is_empty() || of.is_some_and(|names| !names.contains(&name)) {
        return None;
    }
    let written = fields.get("arguments").or(fields.get("parameters")).map_or("null", |written| written.get());
    let arguments = match written.chars().next()? {
        'n' => "{}".to_owned(),
        '{' => written.to_owned(),
        '"' => serde_json::from_str(written)
            .ok()
            .filter(|text: &String| serde_json::from_str::<HashMap<String, &RawValue>>(text).is_ok())?,
        _ => return None,
    };
    Some(ToolCall { name, arguments })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(pieces: impl IntoIterator<Item = Said>) -> Vec<Said> {
        let mut all: Vec<Said> = Vec::new();
        for piece in pieces {
            match (all.last_mut(), piece) {
                (Some(Said::Text(last)), Said::Text(text)) => last.push_str(&text),
                (_, piece) => all.push(piece),
            }
        }
        all
    }

    /// The answer in pieces that end at `cuts`.
    fn read(style: ToolStyle, answer: &str, cuts: &[usize]) -> Vec<Said> {
        let mut reader = CallReader::new(style, vec!["f".into(), "g".into()], 9);
        let (mut said, mut from) = (Vec::new(), 0);
        for at in cuts.iter().copied().chain([answer.len()]) {
            if answer.is_char_boundary(at) && at >= from {
                said.extend(reader.push(&answer[from..at]));
                from = at;
            }
        }
        said.extend(reader.finish());
        joined(said)
    }

    fn text(text: &str) -> Said {
        Said::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> Said {
        Said::Call(ToolCall { name: name.into(), arguments: arguments.into() })
    }

    /// Every kind of answer with what it means.
    fn answers() -> Vec<(ToolStyle, &'static str, Vec<Said>)> {
        use ToolStyle::{Hermes, Llama, Mistral};
        let f = || call("f", r#"{"a": 1}"#);
        vec![
            (Hermes, "just text\n", vec![text("just text\n")]),
            (Hermes, "", vec![]),
            (Hermes, "  \n", vec![text("  \n")]),
            (Hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>", vec![f()]),
            (
                Hermes,
                "\n Sure.\n\n<tool_call>{\"name\":\"f\",\"arguments\":{\"a\": 1}}</tool_call>\n",
                vec![text("\n Sure."), f()],
            ),
            (
                Hermes,
                "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\": 1}}</tool_call>\n<tool_call>{\"name\":\"g\"}</tool_call> done",
                vec![f(), call("g", "{}"), text(" done")],
            ),
            (
                Hermes,
                "<tool_call>[{\"name\":\"f\",\"arguments\":{\"a\": 1}}, {\"name\":\"g\",\"arguments\":null}]</tool_call>",
                vec![f(), call("g", "{}")],
            ),
            // The mark's end inside a string, arguments as text, no end at all.
            (
                Hermes,
                "<tool_call>{\"name\":\"f\",\"arguments\":{\"é\":\"</tool_call>}\"}}</tool_call>",
                vec![call("f", r#"{"é":"</tool_call>}"}"#)],
            ),
            (
                Hermes,
                "<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool",
                vec![call("f", r#"{"a": 1}"#)],
            ),
            (Hermes, "<tool_call>{\"name\":\"other\",\"arguments\":{}}", vec![call("other", "{}")]),
            // What is no call stays text, to the letter.
            (Hermes, "a <tool_call> {\"name\": \"f\", \"argu", vec![text("a <tool_call> {\"name\": \"f\", \"argu")]),
            (Hermes, " <tool_call>{'name': 'f'}</tool_call>", vec![text(" <tool_call>{'name': 'f'}</tool_call>")]),
            (
                Hermes,
                "<tool_call>{\"name\":\"f\",\"arguments\":[1]}</tool_call>",
                vec![text("<tool_call>{\"name\":\"f\",\"arguments\":[1]}</tool_call>")],
            ),
            (
                Hermes,
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"id\": 123456789012345678901, \"x\": 1e400}}",
                vec![call("f", r#"{"id": 123456789012345678901, "x": 1e400}"#)],
            ),
            (Hermes, "<tool_call>[]</tool_call>7", vec![text("<tool_call>[]</tool_call>7")]),
            (Hermes, "<tool_call>f(1)</tool_call>", vec![text("<tool_call>f(1)</tool_call>")]),
            (
                Hermes,
                "x <tool_call> y <tool_call>{\"name\":\"f\",\"arguments\":{\"a\": 1}}</tool_call>",
                vec![text("x <tool_call> y"), f()],
            ),
            (Hermes, "1 <tool_ca", vec![text("1 <tool_ca")]),
            (
                Hermes,
                r#"{"name": "f", "parameters": {"a": 1}}"#,
                vec![text(r#"{"name": "f", "parameters": {"a": 1}}"#)],
            ),
            (Llama, " {\"name\": \"f\", \"parameters\": {\"a\": 1}}", vec![f()]),
            (
                Llama,
                "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"name\": \"g\", \"parameters\": {}}",
                vec![f(), call("g", "{}")],
            ),
            (Llama, "Well. <|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}", vec![text("Well."), f()]),
            (Llama, "{\"name\": \"Ada\", \"parameters\": {}}", vec![text("{\"name\": \"Ada\", \"parameters\": {}}")]),
            (
                Llama,
                "Like {\"name\": \"f\", \"parameters\": {\"a\": 1}}",
                vec![text("Like {\"name\": \"f\", \"parameters\": {\"a\": 1}}")],
            ),
            (Llama, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; and", vec![f(), text("; and")]),
            (
                Mistral,
                "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
                vec![f(), call("g", "{}")],
            ),
            (Mistral, "[TOOL_CALLS] {\"name\": \"f\", \"arguments\": {\"a\": 1}}", vec![f()]),
            (Mistral, "[TOOL_CALLS][1", vec![text("[TOOL_CALLS][1")]),
        ]
    }

    #[test]
    fn calls_are_read_wherever_the_answer_is_cut() {
        for (style, answer, meant) in answers() {
            assert_eq!(read(style, answer, &[]), meant, "{answer}");
            let every: Vec<usize> = (0..answer.len()).collect();
            assert_eq!(read(style, answer, &every), meant, "byte by byte: {answer}");
            for at in every {
                assert_eq!(read(style, answer, &[at]), meant, "cut at {at}: {answer}");
            }
        }
    }

    #[test]
    fn text_is_not_held_back_longer_than_it_must() {
        let mut reader = CallReader::new(ToolStyle::Hermes, vec![], 9);
        assert_eq!(reader.push("one"), [text("one")]);
        assert_eq!(reader.push(" "), []);
        assert_eq!(reader.push("<b> <too"), [text(" <b>")]);
        assert_eq!(reader.push("l_call>{\"name\":\"f\"}"), [call("f", "{}")]);
        assert_eq!((reader.push("</tool_call>"), reader.finish(), reader.calls()), (vec![], vec![], 1));
        assert_eq!(CallReader::plain().push(" <tool_call>"), [text(" <tool_call>")]);
    }

    #[test]
    fn calls_beyond_the_most_are_dropped() {
        let mut reader = CallReader::new(ToolStyle::Hermes, vec![], 1);
        let said = reader
            .push("<tool_call>[{\"name\":\"f\"},{\"name\":\"g\"}]</tool_call><tool_call>{\"name\":\"f\"}</tool_call>");
        assert_eq!((said, reader.finish()), (vec![call("f", "{}")], vec![]));
    }

    proptest! {
        #[test]
        fn no_answer_breaks_it_and_cuts_change_nothing(
            parts in proptest::collection::vec(prop::sample::select(vec![
                "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{\"name\": \"f\"}", "{\"name\"", ": \"f\", ", "\"arguments\": {}}", "[", "]", ";", " ", "\n", "é", "<", "x",
            ]), 0..12),
            cuts in proptest::collection::vec(0usize..80, 0..6),
            style in prop::sample::select(vec![ToolStyle::Hermes, ToolStyle::Llama, ToolStyle::Mistral]),
        ) {
            let answer = parts.concat();
            let mut cuts = cuts;
            cuts.retain(|at| *at <= answer.len());
            cuts.sort_unstable();
            let whole = read(style, &answer, &[]);
            prop_assert_eq!(&read(style, &answer, &cuts), &whole);
            if !whole.iter().any(|said| matches!(said, Said::Call(_))) {
                let expected: Vec<Said> = if answer.is_empty() { vec![] } else { vec![text(&answer)] };
                prop_assert_eq!(whole, expected);
            }
        }
    }
}
