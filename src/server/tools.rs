//! Tools of a request: which functions the model is shown, whether it must call one, and the calls of earlier turns.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::constrain::Asked;
use super::reply::read_from_objects_only;
use crate::engine::request::SamplingParams;
use crate::error::{Error, Result};
use crate::text::{Besides, CallReader, Constraint, Offered, RenderOptions, Tokenizer, call_grammar};

/// Most tools of a request: eight times what OpenAI takes.
const MOST_TOOLS: usize = 1024;

/// A function the model may call.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// What it does.
    pub(crate) description: Option<String>,
    /// JSON schema of its arguments, an object.
    #[schema(value_type = Option<Object>)]
    pub(crate) parameters: Option<Map<String, Value>>,
    /// Calls follow the schema to the letter.
    pub(crate) strict: Option<bool>,
}

/// A tool of a chat; only functions are known.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct ChatTool {
    /// `function`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The function.
    pub(crate) function: Option<Function>,
}

/// A tool of a response; only functions are known.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct FlatTool {
    /// `function`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The function's name.
    pub(crate) name: Option<String>,
    /// What it does.
    pub(crate) description: Option<String>,
    /// JSON schema of its arguments, an object.
    #[schema(value_type = Option<Object>)]
    pub(crate) parameters: Option<Map<String, Value>>,
    /// Calls follow the schema to the letter.
    pub(crate) strict: Option<bool>,
}

/// A call in an assistant's earlier turn.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct GivenCall {
    /// What the result names.
    pub(crate) id: Option<String>,
    /// What was called.
    pub(crate) function: CalledFunction,
}

/// The function of a call.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(crate) struct CalledFunction {
    /// Its name.
    pub(crate) name: String,
    /// Its arguments: the text of a JSON object, or the object.
    #[schema(value_type = Option<Object>)]
    pub(crate) arguments: Option<Value>,
}

read_from_objects_only!(Function, ChatTool, FlatTool, GivenCall, CalledFunction);

fn not_too_many<T>(tools: Option<Vec<T>>) -> Result<Vec<T>> {
    let tools = tools.unwrap_or_default();
    if tools.len() > MOST_TOOLS {
        return Err(Error::invalid(
            "tools",
            format!("`tools` has {} entries, at most {MOST_TOOLS} are read", tools.len()),
        ));
    }
    Ok(tools)
}

fn only_functions(kind: &str, at: usize) -> Result<()> {
    if kind == "function" {
        return Ok(());
    }
    Err(Error::invalid(
        format!("tools[{at}].type"),
        format!("tools of type `{kind}` are not known here, only `function`"),
    ))
}

fn named(function: Function, path: String) -> Result<Function> {
    let name = &function.name;
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(Error::invalid(path, "a function needs a name, without control characters"));
    }
    Ok(function)
}

/// The functions of a chat's tools.
pub(super) fn chat_functions(tools: Option<Vec<ChatTool>>) -> Result<Vec<Function>> {
    let read = |(at, tool): (usize, ChatTool)| {
        only_functions(&tool.kind, at)?;
        let missing = || Error::invalid(format!("tools[{at}].function"), "is missing");
        named(tool.function.ok_or_else(missing)?, format!("tools[{at}].function.name"))
    };
    not_too_many(tools)?.into_iter().enumerate().map(read).collect()
}

/// The functions of a response's tools.
pub(super) fn flat_functions(tools: Option<Vec<FlatTool>>) -> Result<Vec<Function>> {
    let read = |(at, tool): (usize, FlatTool)| {
        only_functions(&tool.kind, at)?;
        let FlatTool { name, description, parameters, strict, .. } = tool;
        let name = name.ok_or_else(|| Error::invalid(format!("tools[{at}].name"), "is missing"))?;
        named(Function { name, description, parameters, strict }, format!("tools[{at}].name"))
    };
    not_too_many(tools)?.into_iter().enumerate().map(read).collect()
}

/// What the model is offered.
#[derive(Clone, Debug, Default)]
pub(super) struct Offer {
    /// The functions it is shown, and so can call, with their places in `tools`.
    functions: Vec<(usize, Function)>,
    /// It must call one.
    must: bool,
    /// It may make several calls in one turn.
    parallel: bool,
}

impl Offer {
    /// Reads `tool_choice`, in the form of chats or of responses. A choice of some functions shows the model only those.
    pub(super) fn read(functions: Vec<Function>, choice: Option<&Value>, parallel: Option<bool>) -> Result<Self> {
        let invalid = |message: &str| Error::invalid("tool_choice", message);
        let all: Vec<String> = functions.iter().map(|function| function.name.clone()).collect();
        let (names, must) = match choice {
            None | Some(Value::Null) => (all, false),
            Some(Value::String(word)) => match word.as_str() {
                "none" => (Vec::new(), false),
                "auto" => (all, false),
                "required" => (all, true),
                _ => return Err(invalid("`tool_choice` is `none`, `auto`, `required` or an object")),
            },
            Some(choice @ Value::Object(_)) => match choice["type"].as_str() {
                Some("function") => (vec![name_in(choice)?], true),
                Some("allowed_tools") => {
                    let allowed = choice.get("allowed_tools").unwrap_or(choice);
                    let must = match allowed["mode"].as_str() {
                        Some("auto") => false,
                        Some("required") => true,
                        _ => return Err(invalid("`mode` of the allowed tools is `auto` or `required`")),
                    };
                    let tools = allowed["tools"].as_array().filter(|tools| !tools.is_empty());
                    let tools = tools.ok_or_else(|| invalid("`tools` of the allowed tools is a list of functions"))?;
                    (tools.iter().map(name_in).collect::<Result<_>>()?, must)
                }
                _ => return Err(invalid("the `type` of an object is `function` or `allowed_tools`")),
            },
            Some(_) => return Err(invalid("`tool_choice` is a word or an object")),
        };
        let known: HashSet<&str> = functions.iter().map(|function| function.name.as_str()).collect();
        if let Some(unknown) = names.iter().find(|name| !known.contains(name.as_str())) {
            return Err(invalid(&format!("`{unknown}` is not among the `tools`")));
        }
        if must && names.is_empty() {
            return Err(invalid("a required call needs `tools`"));
        }
        let names: HashSet<String> = names.into_iter().collect();
        let chosen = |(_, function): &(usize, Function)| names.contains(&function.name);
        let functions = functions.into_iter().enumerate().filter(chosen).collect();
        Ok(Offer { functions, must, parallel: parallel.unwrap_or(true) })
    }

    /// Puts the functions into the prompt. Returns what tells text and calls apart in an answer, and what the answer must be:
    /// a call, or what was `asked` for without the tools, or either. Where a function is strict, a call must be right wherever
    /// the model makes one.
    pub(super) fn apply(
        &self,
        tokenizer: &Tokenizer,
        asked: Option<Asked>,
        render: &mut RenderOptions,
        params: &mut SamplingParams,
    ) -> Result<(CallReader, Option<Asked>)> {
        render.tools = self.shown();
        if self.functions.is_empty() {
            return Ok((CallReader::plain(), asked));
        }
        // Some vocabularies have the marks of calls as special tokens.
        params.skip_special_tokens = false;
        let style = tokenizer.tool_style(render);
        let names = self.functions.iter().map(|(_, function)| function.name.clone()).collect();
        let most = if self.parallel { usize::MAX } else { 1 };
        let any = Map::from_iter([("type".to_owned(), json!("object"))]);
        let calls = |besides: Besides| -> Result<Option<Asked>> {
            let functions = self.functions.iter().map(|(at, function)| {
                let parameters = match besides {
                    Besides::Text if function.strict != Some(true) => Some(&any),
                    _ => function.parameters.as_ref(),
                };
                Offered { at: *at, name: &function.name, parameters }
            });
            let functions: Vec<_> = functions.collect();
            Ok(Some(("tools", call_grammar(tokenizer, style, &functions, self.parallel, besides)?)))
        };
        let asked = match asked {
            _ if self.must => calls(Besides::Nothing)?,
            Some((_, json @ (Constraint::JsonSchema(_) | Constraint::JsonObject))) => calls(Besides::Json(json))?,
            None if self.functions.iter().any(|(_, function)| function.strict == Some(true)) => calls(Besides::Text)?,
            other => other,
        };
        Ok((CallReader::new(style, names, most), asked))
    }

    /// The choice as chats make it; nothing where the model may do as it likes.
    pub(super) fn choice(&self) -> Option<Value> {
        match self.functions.as_slice() {
            _ if !self.must => None,
            [(_, only)] => Some(json!({"type": "function", "function": {"name": only.name}})),
            _ => Some(json!("required")),
        }
    }

    /// The functions as templates and chats take them.
    pub(super) fn shown(&self) -> Option<Value> {
        let one = |(_, function): &(usize, Function)| {
            let mut body = json!({"name": function.name});
            let fields = [
                ("description", json!(function.description)),
                ("parameters", json!(function.parameters)),
                ("strict", json!(function.strict)),
            ];
            for (key, value) in fields.into_iter().filter(|(_, value)| !value.is_null()) {
                body[key] = value;
            }
            json!({"type": "function", "function": body})
        };
        (!self.functions.is_empty()).then(|| self.functions.iter().map(one).collect())
    }
}

fn name_in(choice: &Value) -> Result<String> {
    let name = choice["function"]["name"].as_str().or(choice["name"].as_str());
    name.filter(|_| choice["type"] == "function")
        .map(str::to_owned)
        .ok_or_else(|| Error::invalid("tool_choice", "a chosen tool is of type `function` and has a `name`"))
}

/// A call of an earlier turn, as templates take it: the arguments are an object. `path` is where they were given.
pub(super) fn earlier_call(
    id: &str,
    name: &str,
    arguments: Option<&Value>,
    path: impl Fn() -> String,
) -> Result<Value> {
    let arguments = match arguments {
        None | Some(Value::Null) => json!({}),
        Some(object @ Value::Object(_)) => object.clone(),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => match serde_json::from_str::<Map<String, Value>>(text) {
            Ok(object) => Value::Object(object),
            Err(error) => return Err(Error::invalid(path(), format!("is not the text of a JSON object: {error}"))),
        },
        Some(_) => return Err(Error::invalid(path(), "must be the text of a JSON object")),
    };
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// A fresh id of a call.
pub(super) fn call_id() -> String {
    format!("call_{}", uuid::Uuid::new_v4().simple())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn offer(choice: Value) -> Result<(Vec<String>, bool)> {
        let functions = ["f", "g"].map(|name| Function { name: name.into(), ..Function::default() });
        let offer = Offer::read(functions.into(), Some(&choice), None)?;
        Ok((offer.functions.into_iter().map(|(_, function)| function.name).collect(), offer.must))
    }

    #[test]
    fn a_choice_says_what_is_shown_and_whether_it_must_be() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let g = json!({"type": "function", "function": {"name": "g"}});
        let flat = json!({"type": "function", "name": "g"});
        for (choice, shown, must) in [
            (json!(null), &["f", "g"][..], false),
            (json!("none"), &[], false),
            (json!("auto"), &["f", "g"], false),
            (json!("required"), &["f", "g"], true),
            (g.clone(), &["g"], true),
            (flat.clone(), &["g"], true),
            (json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [g]}}), &["g"], false),
            (json!({"type": "allowed_tools", "mode": "required", "tools": [flat]}), &["g"], true),
        ] {
            assert_eq!(offer(choice.clone()).unwrap(), (names(shown), must), "{choice}");
        }
        for choice in [
            json!("any"),
            json!(3),
            json!({"type": "auto"}),
            json!({"type": "function"}),
            json!({"type": "function", "name": "h"}),
            json!({"type": "allowed_tools", "mode": "auto", "tools": []}),
            json!({"type": "allowed_tools", "mode": "none", "tools": [{"type": "function", "name": "f"}]}),
        ] {
            assert_eq!(offer(choice.clone()).unwrap_err().param.as_deref(), Some("tool_choice"), "{choice}");
        }
        let Offer { functions, .. } = Offer::read(
            ["f", "g", "f"].map(|name| Function { name: name.into(), ..Function::default() }).into(),
            Some(&json!({"type": "function", "name": "f"})),
            None,
        )
        .unwrap();
        assert_eq!(functions.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 2], "places in `tools`");
        assert!(Offer::read(Vec::new(), Some(&json!("required")), None).is_err());
        assert!(Offer::read(Vec::new(), Some(&json!("auto")), None).is_ok());
    }

    #[test]
    fn there_are_not_too_many() {
        let tools = |count: usize| {
            let one = |at: usize| json!({"type": "function", "name": format!("f{at}"), "function": {"name": format!("f{at}")}});
            (0..count).map(one).collect::<Value>()
        };
        let read = |count: usize| {
            let flat = flat_functions(serde_json::from_value(tools(count)).unwrap());
            (chat_functions(serde_json::from_value(tools(count)).unwrap()), flat)
        };
        let (chat, flat) = read(MOST_TOOLS);
        assert_eq!(chat.unwrap().len(), MOST_TOOLS);
        let choice = json!({"type": "allowed_tools", "mode": "auto", "tools": tools(MOST_TOOLS)});
        assert_eq!(Offer::read(flat.unwrap(), Some(&choice), None).unwrap().functions.len(), MOST_TOOLS);
        let (chat, flat) = read(MOST_TOOLS + 1);
        assert_eq!(chat.unwrap_err().param.as_deref(), Some("tools"));
        assert_eq!(flat.unwrap_err().param.as_deref(), Some("tools"));
    }

    #[test]
    fn arguments_of_earlier_calls_become_objects() {
        let read = |arguments: Value| earlier_call("1", "f", Some(&arguments), || "x.arguments".into());
        for (given, object) in [
            (json!("{\"a\": 1}"), json!({"a": 1})),
            (json!({"a": 1}), json!({"a": 1})),
            (json!(""), json!({})),
            (json!(null), json!({})),
        ] {
            assert_eq!(read(given).unwrap()["function"]["arguments"], object);
        }
        for wrong in [json!("{"), json!("[1]"), json!(3)] {
            assert_eq!(read(wrong).unwrap_err().param.as_deref(), Some("x.arguments"));
        }
    }
}
