//! One route: what it is made of, and how OpenAPI writes it.

use serde_json::{Map, Value, json};

use crate::error::Code;
use crate::server::guard::OPEN;

/// One route.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    /// Name in generated clients.
    pub(super) id: &'static str,
    pub(super) tag: &'static str,
    pub(super) summary: &'static str,
    pub(super) parameters: Vec<Value>,
    pub(super) body: Option<Value>,
    /// Content of a 200 by media type.
    pub(super) reply: Value,
    /// Headers of a 200 besides `x-request-id`.
    pub(super) headers: &'static [(&'static str, &'static str)],
    pub(super) errors: &'static [u16],
}

/// What a generation under an adapter says about it.
pub(super) const ADAPTER_HEADERS: &[(&str, &str)] = &[
    ("x-adapter-version", "Version of the adapter that answered; 0 is the base"),
    ("x-adapter-generation", "Content hash of that adapter; absent for the base"),
];
pub(super) const GENERATES: &[u16] = &[400, 404, 413, 422, 429, 500, 503, 504];
pub(super) const READS: &[u16] = &[400, 404, 500];
pub(super) const CHANGES: &[u16] = &[400, 404, 409, 413, 500];
pub(super) const ADAPTERS: &[u16] = &[400, 403, 404, 409, 413, 422, 500];

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn json_of(schema: Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

pub(super) fn one(name: &str) -> Value {
    json_of(reference(name))
}

pub(super) fn list_of(name: &str) -> Value {
    json_of(json!({
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"type": "string", "enum": ["list"]},
            "data": {"type": "array", "items": reference(name)},
        },
    }))
}

pub(super) fn page_of(name: &str) -> Value {
    let mut page = list_of(name);
    let schema = &mut page["application/json"]["schema"];
    schema["required"] = json!(["object", "data", "has_more"]);
    schema["properties"]["has_more"] = json!({"type": "boolean", "description": "Ask again with `after` for the rest"});
    page
}

/// A reply that is one object, or the pieces of it as server-sent events.
pub(super) fn one_or_stream(name: &str, piece: &str) -> Value {
    let mut content = one(name);
    content["text/event-stream"] = events(piece);
    content
}

/// The pieces alone.
pub(super) fn events(piece: &str) -> Value {
    let text = format!(
        "`data` is a JSON object of the form `#/components/schemas/{piece}`, or an `ErrorReply` where something fails on the way; \
         the last is `[DONE]`, except of a response."
    );
    let event = json!({
        "type": "object",
        "description": "One event of the stream.",
        "required": ["data"],
        "properties": {"data": {"type": "string", "description": text}, "id": {"type": "string", "description": "Number of the event, on a job's streams."}},
    });
    json!({"schema": event, "example": "data: {\"id\": \"…\"}\n\ndata: [DONE]\n\n"})
}

pub(super) fn text(kind: &str) -> Value {
    json!({kind: {"schema": {"type": "string"}}})
}

pub(super) fn body(name: &str, required: bool, examples: &[(&str, Value)]) -> Option<Value> {
    let mut content = one(name);
    if !examples.is_empty() {
        let named: Map<String, Value> =
            examples.iter().map(|(title, value)| ((*title).to_owned(), json!({"value": value}))).collect();
        content["application/json"]["examples"] = Value::Object(named);
    }
    Some(json!({"required": required, "content": content}))
}

pub(super) fn parameter(place: &str, name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": place, "required": place == "path", "description": description, "schema": schema})
}

pub(super) fn id_of(what: &str) -> Value {
    parameter("path", "id", what, json!({"type": "string", "minLength": 1}))
}

pub(super) fn response_id() -> Value {
    id_of("The response, `resp_…`")
}

pub(super) fn job() -> Value {
    id_of("The job, `rdpo-…`")
}

pub(super) fn alias() -> Value {
    parameter("path", "alias", "Name of the adapter", super::limits::alias())
}

pub(super) fn limit(usual: u64, most: u64) -> Value {
    let schema = json!({"type": "integer", "minimum": 1, "maximum": most, "default": usual});
    parameter("query", "limit", "Most entries", schema)
}

pub(super) fn route(
    method: &'static str,
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    reply: Value,
) -> Operation {
    let errors = if method == "get" { READS } else { GENERATES };
    Operation { method, path, id, tag, summary, parameters: Vec::new(), body: None, reply, headers: &[], errors }
}

impl Operation {
    /// The route as OpenAPI writes it.
    pub(super) fn rendered(&self) -> Value {
        let header = |text: &str| json!({"description": text, "schema": {"type": "string"}});
        let request_id = header("The request's id, for the log");
        let mut headers = Map::new();
        headers.insert("x-request-id".into(), request_id.clone());
        headers.extend(self.headers.iter().map(|(name, text)| ((*name).to_owned(), header(text))));
        let mut done = json!({"description": "Done", "headers": headers});
        if !self.reply.is_null() {
            done["content"] = self.reply.clone();
        }
        let open = OPEN.contains(&self.path);
        let mut errors = self.errors.to_vec();
        // Any answer can be refused for its `accept-encoding`.
        errors.push(406);
        if !open {
            errors.extend([401, 503]);
            if self.method != "get" {
                errors.push(403);
            }
        }
        errors.sort_unstable();
        errors.dedup();
        let mut responses = Map::new();
        responses.insert("200".into(), done);
        for status in errors {
            let mut headers = json!({"x-request-id": request_id});
            if matches!(status, 429 | 503) {
                headers["retry-after"] = header("Seconds to wait");
            }
            if status == 401 {
                headers["www-authenticate"] = header("`Bearer`");
            }
            if matches!(status, 409 | 504) {
                headers["x-should-retry"] = header("`false`: the same request fails again");
            }
            let response = json!({"description": meaning(status), "headers": headers, "content": one("ErrorReply")});
            responses.insert(status.to_string(), response);
        }
        let mut shown = json!({"tags": [self.tag], "summary": self.summary, "operationId": self.id});
        if !self.parameters.is_empty() {
            shown["parameters"] = json!(self.parameters);
        }
        if let Some(body) = &self.body {
            shown["requestBody"] = body.clone();
        }
        shown["responses"] = Value::Object(responses);
        shown["security"] = if open { json!([]) } else { json!([{"bearer": []}]) };
        shown
    }
}

fn meaning(status: u16) -> String {
    let text = match status {
        400 => "The request is wrong; `param` names the field",
        401 => "Missing or wrong key",
        403 => "A path outside its root, or the page of another site where no key is asked for",
        404 => "No such model, adapter or job",
        406 => "No encoding that the client takes",
        409 => "The state does not allow it",
        413 => "The body is larger than the server reads",
        422 => "Well-formed but unusable",
        429 => "The queue is full",
        503 => "Stopping, out of room, or a remote role that cannot be reached",
        504 => "It took longer than the server allows",
        _ => "A defect, or the machine's",
    };
    let known = [
        Code::InvalidValue,
        Code::UnsupportedParameter,
        Code::UnknownField,
        Code::ContextLengthExceeded,
        Code::InvalidApiKey,
        Code::Forbidden,
        Code::ModelNotFound,
        Code::NotFound,
        Code::Conflict,
        Code::TooLarge,
        Code::Unprocessable,
        Code::RateLimited,
        Code::Internal,
        Code::Overloaded,
        Code::OutOfMemory,
        Code::TimedOut,
        Code::Unreachable,
    ];
    let codes: Vec<&str> = known.iter().map(|code| code.row()).filter(|row| row.0 == status).map(|row| row.2).collect();
    if codes.is_empty() { text.to_owned() } else { format!("{text} (`code`: {})", codes.join(", ")) }
}
