//! A grammar of calls: what an answer must be where a call is required, or where it may be one or JSON.

use serde_json::{Map, Value, json};

use super::ToolStyle;
use crate::error::{Error, Result};
use crate::text::Tokenizer;
use crate::text::grammar::{Constraint, spaced};

/// Most calls a grammar lets a model make in one turn: small ones would go on until they are cut off in the middle of one.
const MOST_CALLS: usize = 8;

/// Calls of the `functions` (names, and schemas of their arguments) in the model's own style; with `or`, JSON instead.
pub fn call_grammar(
    tokenizer: &Tokenizer,
    style: ToolStyle,
    functions: &[(&str, Option<&Map<String, Value>>)],
    parallel: bool,
    or: Option<Constraint>,
) -> Result<Constraint> {
    let more = |between: &str| match parallel {
        true => format!("({} one){{0,{}}}", quoted(between), MOST_CALLS - 1),
        false => String::new(),
    };
    let names: Vec<String> = (0..functions.len()).map(|at| format!("call_{at}")).collect();
    let (any, [open, close]) = (names.join(" | "), [style.marks().0, style.marks().1]);
    let (calls, one) = match style {
        ToolStyle::Hermes => {
            let (open, close) = (quoted(&format!("{open}\n")), quoted(&format!("\n{close}")));
            (format!("one {}", more("\n")), format!("{open} ({any}) {close}"))
        }
        // Bare JSON could not be told from the other JSON while it is written.
        ToolStyle::Llama if or.is_some() => (format!("{} one {}", mark(tokenizer, open), more("; ")), any),
        ToolStyle::Llama => (format!("one {}", more("; ")), any),
        ToolStyle::Mistral => (format!("{} \"[\" one {} \"]\"", mark(tokenizer, open), more(", ")), any),
    };
    let mut rules = vec![format!("calls: {calls}"), format!("one: {one}")];
    for (at, (name, parameters)) in functions.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"{}\": ", json!(name), style.arguments_key());
        rules.push(format!("call_{at}: {} arguments_{at} \"}}\"", quoted(&head)));
        // Each schema is a document of its own, so that what it refers to is found.
        rules.push(format!("arguments_{at}: %json {}", spaced(&arguments(at, *parameters)?)?));
    }
    match or {
        None => rules.insert(0, "start: calls".into()),
        Some(constraint) => {
            let schema = match constraint {
                Constraint::JsonSchema(schema) => schema,
                _ => json!({"type": "object"}),
            };
            rules.insert(0, "start: calls | answer".into());
            rules.push(format!("answer: %json {}", spaced(&schema)?));
        }
    }
    Ok(Constraint::Lark(rules.join("\n")))
}

/// The schema of a function's arguments: always an object's, and an empty one where the function has none.
fn arguments(at: usize, parameters: Option<&Map<String, Value>>) -> Result<Value> {
    let Some(parameters) = parameters.filter(|parameters| !parameters.is_empty()) else {
        return Ok(json!({"type": "object", "additionalProperties": false}));
    };
    let mut schema = parameters.clone();
    if *schema.entry("type").or_insert_with(|| json!("object")) != "object" {
        return Err(Error::invalid(format!("tools[{at}]"), "the arguments of a function are an object"));
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
            chat_template: None,
            bos_token: None,
            eos_token: Some("</s>".into()),
            pad_token: None,
            add_bos_token: false,
            eos_token_ids: vec![vocab["</s>"].as_u64().unwrap() as u32],
        })
        .unwrap()
    }

    fn grammar(tokenizer: &Tokenizer, style: ToolStyle, parallel: bool, or: Option<Constraint>) -> Grammar {
        let number = json!({"properties": {"n": {"$ref": "#/$defs/digit"}}, "required": ["n"], "additionalProperties": false,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}});
        let functions = [("add \"1\"", number.as_object()), ("now", None)];
        Grammar::compile(tokenizer, call_grammar(tokenizer, style, &functions, parallel, or).unwrap()).unwrap()
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
            let (any, single) = (grammar(&tokenizer, style, true, None), grammar(&tokenizer, style, false, None));
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
            let either = grammar(&tokenizer, style, false, Some(Constraint::JsonSchema(schema.clone())));
            assert!(takes(&tokenizer, &either, "{\"x\": true}") && !takes(&tokenizer, &either, "{\"y\": true}"));
            let call = format!("{{\"name\": \"now\", \"{}\": {{}}}}", style.arguments_key());
            let call = match style {
                ToolStyle::Hermes => format!("<tool_call>\n{call}\n</tool_call>"),
                _ => format!("<|python_tag|>{call}"),
            };
            assert!(takes(&tokenizer, &either, &call), "{call}");
        }
    }

    #[test]
    fn arguments_are_an_object() {
        let list = json!({"type": "array"});
        let tokenizer = letters();
        let error = call_grammar(&tokenizer, ToolStyle::Hermes, &[("f", None), ("g", list.as_object())], true, None)
            .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools[1]"));
    }
}
