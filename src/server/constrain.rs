//! What an answer must be, as OpenAI (`response_format`) and vLLM (`structured_outputs`) ask for it.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::reply::{blocking, read_from_objects_only};
use crate::error::{Code, Error, Result};
use crate::text::{Constraint, Grammar, Tokenizer};

/// `response_format`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` (any JSON object) or `json_schema`.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// With `json_schema`.
    pub(super) json_schema: Option<NamedSchema>,
}

/// A JSON schema with its name. It is enforced whether `strict` or not.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(super) struct NamedSchema {
    /// The schema.
    #[schema(value_type = Object)]
    pub(super) schema: Option<Value>,
}

/// vLLM's `structured_outputs`: one of the fields.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub(super) struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    #[schema(value_type = Option<Object>)]
    json: Option<Value>,
    /// A regular expression that the whole answer matches.
    regex: Option<String>,
    /// Texts, one of which is the answer.
    choice: Option<Vec<String>>,
    /// A grammar in Lark's form.
    grammar: Option<String>,
    /// Any JSON object.
    json_object: Option<bool>,
    #[schema(ignore)]
    structural_tag: Option<Value>,
    #[schema(ignore)]
    whitespace_pattern: Option<String>,
}

read_from_objects_only!(ResponseFormat, NamedSchema, StructuredOutputs);

/// A constraint and the field that asks for it.
pub(super) type Asked = (&'static str, Constraint);

impl ResponseFormat {
    /// What it asks for; nothing for `text`.
    pub(super) fn asked(&self) -> Result<Option<Asked>> {
        let field = "response_format.json_schema.schema";
        let missing = || Error::invalid(field, format!("`{field}` is missing"));
        // A schema that is given is checked whether the type asks for it or not.
        let schema = match &self.json_schema {
            None => None,
            Some(NamedSchema { schema: None }) => return Err(missing()),
            Some(NamedSchema { schema: Some(schema) }) => Some(schema_form(field, schema)?.ok_or_else(missing)?),
        };
        match self.kind.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(("response_format", Constraint::JsonObject))),
            "json_schema" => Ok(Some((field, Constraint::JsonSchema(schema.ok_or_else(missing)?)))),
            other => {
                let text = format!("`{other}` is not a format: text, json_object and json_schema are");
                Err(Error::invalid("response_format.type", text))
            }
        }
    }
}

/// A JSON schema as it was given, if it was: an object or a boolean.
pub(super) fn schema_form(field: &str, schema: &Value) -> Result<Option<Value>> {
    match schema {
        Value::Null => Ok(None),
        Value::Object(_) | Value::Bool(_) => Ok(Some(schema.clone())),
        _ => Err(Error::invalid(field, format!("`{field}` is no JSON schema: that is an object"))),
    }
}

impl StructuredOutputs {
    /// What it asks for.
    pub(super) fn asked(&self) -> Result<Option<Asked>> {
        let refused = [
            ("structured_outputs.structural_tag", self.structural_tag.as_ref().is_some_and(|tag| !tag.is_null())),
            ("structured_outputs.whitespace_pattern", self.whitespace_pattern.is_some()),
        ];
        if let Some((field, _)) = refused.iter().find(|(_, set)| *set) {
            return Err(Error::new(Code::UnsupportedParameter, format!("`{field}` is not supported")).at(*field));
        }
        let json = match &self.json {
            Some(Value::String(text)) => Some(serde_json::from_str(text).map_err(|error| {
                Error::invalid("structured_outputs.json", format!("`structured_outputs.json` is not JSON: {error}"))
            })?),
            json => json.clone().filter(|json| !json.is_null()),
        };
        let asked = [
            json.map(|schema| ("structured_outputs.json", Constraint::JsonSchema(schema))),
            self.regex.clone().map(|text| ("structured_outputs.regex", Constraint::Regex(text))),
            self.choice.clone().map(|texts| ("structured_outputs.choice", Constraint::Choice(texts))),
            self.grammar.clone().map(|text| ("structured_outputs.grammar", Constraint::Lark(text))),
            (self.json_object == Some(true)).then_some(("structured_outputs.json_object", Constraint::JsonObject)),
        ];
        let mut asked = asked.into_iter().flatten();
        match (asked.next(), asked.next()) {
            (first, None) => Ok(first),
            (_, Some((field, _))) => Err(Error::invalid(
                field,
                format!("`structured_outputs` takes one constraint, and `{field}` is a second"),
            )),
        }
    }
}

/// Compiles what was asked, off the threads that answer; errors name the field.
pub(super) async fn compile(tokenizer: Arc<Tokenizer>, (field, constraint): Asked) -> Result<Arc<Grammar>> {
    let grammar = blocking(move || Grammar::compile(&tokenizer, constraint)).await;
    grammar.map(Arc::new).map_err(|error| match error.code {
        Code::InvalidValue => Error::invalid(field, format!("`{field}`: {}", error.message)),
        _ => error,
    })
}
