//! A grammar of calls: what an answer must be where a call is required, or where it may be one or JSON, or text with calls in it.

use serde_json::{Map, Value, json};

use super::ToolStyle;
use crate::error::{Error, Result};
use crate::text::Tokenizer;
use crate::text::grammar::{Constraint, spaced};

/// Most calls a grammar lets a model make in one turn: small ones would go on until they are cut off in the middle of one.
const MOST_CALLS: usize = 8;

/// What an answer may be besides calls.
#[derive(Clone, Debug, PartialEq)]
pub enum Besides {
    /// Nothing: it must call.
    Nothing,
    /// JSON of a schema, or any object.
    Json(Constraint),
    /// Text, which may go on to calls.
    Text,
}

/// A function that may be called.
#[derive(Clone, Copy, Debug)]
pub struct Offered<'a> {
    /// Its place in the request's `tools`.
    pub at: usize,
    /// Its name.
    pub name: &'a str,
    /// The schema of its arguments.
    pub parameters: Option<&'a Map<String, Value>>,
}

/// Calls of the `functions` in the model's own style, or what else the answer may be.
pub fn call_grammar(
    tokenizer: &Tokenizer,
    style: ToolStyle,
    functions: &[Offered<'_>],
    parallel: bool,
    besides: Besides,
) -> Result<Constraint> {
    let more = |between: &str| match parallel {
        true => format!("({} one){{0,{}}}", quoted(between), MOST_CALLS - 1),
        false => String::new(),
    };
    let names: Vec<String> = (0..functions.len()).map(|at| format!("call_{at}")).collect();
    let (any, [open, close]) = (names.join(" | "), [style.marks().0, style.marks().1]);
    // What stands after the opening mark.
    let (inner, one) = match style {
        ToolStyle::Hermes => ("one".to_owned(), format!("\"\\n\" ({any}) {}", quoted(&format!("\n{close}")))),
        ToolStyle::Llama => (format!("one {}", more("; ")), any),
        ToolStyle::Mistral => (format!("\"[\" one {} \"]\"", more(", ")), any),
    };
    let opened = mark(tokenizer, open);
    let calls = match style {
        ToolStyle::Hermes if parallel => format!("{opened} one (\"\\n\" {opened} one){{0,{}}}", MOST_CALLS - 1),
        // Bare JSON could not be told from the other JSON while it is written.
        ToolStyle::Llama if !matches!(besides, Besides::Json(_)) => inner.clone(),
        _ => format!("{opened} {inner}"),
    };
    let mut rules = vec![format!("calls: {calls}"), format!("one: {one}")];
    for (at, function) in functions.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"{}\": ", json!(function.name), style.arguments_key());
        rules.push(format!("call_{at}: {} arguments_{at} \"}}\"", quoted(&head)));
        // Each schema is a document of its own, so that what it refers to is found.
        rules.push(format!("arguments_{at}: %json {}", spaced(&arguments(function)?)?));
    }
    match besides {
        Besides::Nothing => rules.insert(0, "start: calls".into()),
        Besides::Json(constraint) => {
            let schema = match constraint {
                Constraint::JsonSchema(schema) => schema,
                _ => json!({"type": "object"}),
            };
            rules.insert(0, "start: calls | answer".into());
            rules.push(format!("answer: %json {}", spaced(&schema)?));
        }
        Besides::Text => {
            // Llama's bare call is one only at the beginning: there is no other text that begins like it.
            let (start, text) = match style {
                ToolStyle::Hermes => ("said*", r"(.|\n)+"),
                ToolStyle::Mistral => ("said?", r"(.|\n)+"),
                ToolStyle::Llama => ("(calls | said)?", r"\s*[^\s{](.|\n)*"),
            };
            let start = if parallel { start.to_owned() } else { start.replace('*', "?") };
            rules.insert(0, format!("start: {start} TEXT?"));
            rules.push(format!("said: opening {inner}"));
            match tokenizer.special_id(open) {
                Some(_) => rules.extend([format!("opening: TEXT? {opened}"), format!("TEXT: /{text}/")]),
                // Lazy: with the last letter of the mark the text is over.
                None => {
                    let mark = regex::escape(open);
                    rules.push(format!("opening[lazy]: /({text})?{mark}/"));
                    rules.push(format!(r"TEXT: /{text}/ & ~/(.|\n)*{mark}(.|\n)*/"));
                }
            }
        }
    }
    Ok(Constraint::Lark(rules.join("\n")))
}

/// The schema of a function's arguments: always an object's, and an empty one where the function has none.
fn arguments(function: &Offered<'_>) -> Result<Value> {
    let Some(parameters) = function.parameters.filter(|parameters| !parameters.is_empty()) else {
        return Ok(json!({"type": "object", "additionalProperties": false}));
    };
    let mut schema = parameters.clone();
    if *schema.entry("type").or_insert_with(|| json!("object")) != "object" {
        return Err(Error::invalid(format!("tools[{}]", function.at), "the arguments of a function are an object"));
    }
    Ok(Value::Object(schema))
}

/// A text as Lark writes it.
fn quoted(text: &str) -> String {
    json!(text).to_string()
}

/// A mark, as the special token it may be: those are not spelled by text.
fn mark(tokenizer: &Tokenizer, text: &str) -> String {
    match tokenizer.special_id(text) {
        Some(id) => format!("<[{id}]>"),
        None => quoted(text),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::text::{CallReader, Grammar, Said, TokenizerOptions};

    /// A token for each printable character, one for the new line, one for the end, and a special one for Mistral's mark.
    fn letters() -> Tokenizer {
        let alphabet: Vec<String> = (0x21..=0x7eu8).map(|byte| char::from(byte).to_string()).collect();
        let mut words = [alphabet, vec!["Ġ".into(), "Ċ".into()]].concat();
        words.extend(["</s>".to_owned(), "[TOOL_CALLS]".to_owned()]);
        let vocab: Map<String, Value> = words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
        let added = |text: &str| json!({"id": vocab[text], "content": text, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let json = json!({"version": "1.0", "added_tokens": [added("</s>"), added("[TOOL_CALLS]")], "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        Tokenizer::new(TokenizerOptions {
            tokenizer_json: json.to_string(),
            eos_token: Some("</s>".into()),
            eos_token_ids: vec![vocab["</s>"].as_u64().unwrap() as u32],
            ..TokenizerOptions::default()
        })
        .unwrap()
    }

    fn grammar(tokenizer: &Tokenizer, style: ToolStyle, parallel: bool, besides: Besides) -> Grammar {
        let number = json!({"properties": {"n": {"$ref": "#/$defs/digit"}}, "required": ["n"], "additionalProperties": false,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}});
        let functions = [
            Offered { at: 0, name: "add \"1\"", parameters: number.as_object() },
            Offered { at: 1, name: "now", parameters: None },
        ];
        Grammar::compile(tokenizer, call_grammar(tokenizer, style, &functions, parallel, besides).unwrap()).unwrap()
    }

    /// Whether the text is all that the grammar wants; special tokens are read as such.
    fn takes(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> bool {
        let mut matcher = grammar.matcher();
        let ids = tokenizer.encode(text, false).unwrap();
        ids.into_iter().all(|id| matcher.mask().unwrap().allows(id) && matcher.commit(id).is_ok())
            && matcher.is_accepting()
    }

    #[test]
    fn a_required_call_is_one_that_is_read_again() {
        let tokenizer = letters();
        for (style, one, two) in [
            (
                ToolStyle::Hermes,
                "<tool_call>\n{\"name\": \"add \\\"1\\\"\", \"arguments\": {\"n\": 4}}\n</tool_call>",
                "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
            ),
            (
                ToolStyle::Llama,
                "{\"name\": \"add \\\"1\\\"\", \"parameters\": {\"n\": 4}}",
                "{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}",
            ),
            (
                ToolStyle::Mistral,
                "[TOOL_CALLS][{\"name\": \"add \\\"1\\\"\", \"arguments\": {\"n\": 4}}]",
                "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"now\", \"arguments\": {}}]",
            ),
        ] {
            let [any, single] = [true, false].map(|parallel| grammar(&tokenizer, style, parallel, Besides::Nothing));
            assert!(takes(&tokenizer, &any, one) && takes(&tokenizer, &single, one), "{one}");
            assert!(takes(&tokenizer, &any, two) && !takes(&tokenizer, &single, two), "{two}");
            for wrong in [
                "",
                "Hello",
                &one.replace('4', "12"),
                &one.replace("{\"n\": 4}", "{}"),
                &two.replace("now", "new"),
                &two.replace("{}", "{\"a\": 1}"),
            ] {
                assert!(!takes(&tokenizer, &any, wrong), "{wrong}");
            }
            let names = || vec!["add \"1\"".into(), "now".into()];
            for (text, calls) in [(one, 1), (two, 2)] {
                let mut reader = CallReader::new(style, names(), 9);
                let said = [reader.push(text), reader.finish()].concat();
                assert!(said.len() == calls && said.iter().all(|said| matches!(said, Said::Call(_))), "{said:?}");
            }
        }
    }

    #[test]
    fn a_call_or_an_answer_in_json() {
        let tokenizer = letters();
        let schema = json!({"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": false});
        for style in [ToolStyle::Hermes, ToolStyle::Llama] {
            let either = grammar(&tokenizer, style, false, Besides::Json(Constraint::JsonSchema(schema.clone())));
            assert!(takes(&tokenizer, &either, "{\"x\": true}") && !takes(&tokenizer, &either, "{\"y\": true}"));
            let call = format!("{{\"name\": \"now\", \"{}\": {{}}}}", style.arguments_key());
            let call = match style {
                ToolStyle::Hermes => format!("<tool_call>\n{call}\n</tool_call>"),
                _ => format!("<|python_tag|>{call}"),
            };
            assert!(takes(&tokenizer, &either, &call), "{call}");
        }
    }

    /// Whether the text may stand at the beginning of an answer.
    fn begins(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> bool {
        let mut matcher = grammar.matcher();
        let ids = tokenizer.encode(text, false).unwrap();
        ids.into_iter().all(|id| matcher.mask().unwrap().allows(id) && matcher.commit(id).is_ok())
    }

    #[test]
    fn text_is_free_until_a_call_begins() {
        let tokenizer = letters();
        for (style, open, close) in [
            (ToolStyle::Hermes, "<tool_call>\n", "\n</tool_call>"),
            (ToolStyle::Llama, "<|python_tag|>", ""),
            (ToolStyle::Mistral, "[TOOL_CALLS][", "]"),
        ] {
            let [any, single] = [true, false].map(|parallel| grammar(&tokenizer, style, parallel, Besides::Text));
            let call =
                |n: u32| format!("{{\"name\": \"add \\\"1\\\"\", \"{}\": {{\"n\": {n}}}}}", style.arguments_key());
            let right = format!("{open}{}{close}", call(4));
            let texts = ["", "Hello,\nyou <tool_cal {1} [TOOL", " <|python_tag"];
            for text in texts {
                for free in [text.to_owned(), format!("{text}{right}")] {
                    assert!(takes(&tokenizer, &any, &free) && takes(&tokenizer, &single, &free), "{free}");
                }
                for wrong in
                    [call(12), call(4).replace("add", "sub"), call(4).replace("4}", "4, \"m\": 1}"), "1".into()]
                {
                    let wrong = format!("{text}{open}{wrong}");
                    assert!(!begins(&tokenizer, &any, &wrong), "{wrong}");
                }
            }
            if style == ToolStyle::Hermes {
                let twice = format!("a {right} b {right} c");
                assert!(takes(&tokenizer, &any, &twice) && !begins(&tokenizer, &single, &twice));
            }
            let bare = style == ToolStyle::Llama;
            assert_eq!(begins(&tokenizer, &any, "{\"x\""), !bare, "a call may begin so: {style:?}");
            assert!(takes(&tokenizer, &any, &call(4)));
        }
    }

    #[test]
    fn arguments_are_an_object() {
        let list = json!({"type": "array"});
        let tokenizer = letters();
        let functions = [
            Offered { at: 2, name: "f", parameters: None },
            Offered { at: 5, name: "g", parameters: list.as_object() },
        ];
        let error = call_grammar(&tokenizer, ToolStyle::Hermes, &functions, true, Besides::Nothing).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools[5]"), "its place in the request");
    }
}
