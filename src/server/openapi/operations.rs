//! Every route: what it takes, what it answers, how it fails.

use serde_json::{Map, Value, json};

use crate::error::Code;
use crate::server::guard::OPEN;

/// One route.
struct Operation {
    method: &'static str,
    path: &'static str,
    /// Name in generated clients.
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    parameters: Vec<Value>,
    body: Option<Value>,
    /// Content of a 200 by media type.
    reply: Value,
    /// Headers of a 200 besides `x-request-id`.
    headers: &'static [(&'static str, &'static str)],
    errors: &'static [u16],
}

/// What a generation under an adapter says about it.
const ADAPTER_HEADERS: &[(&str, &str)] = &[
    ("x-adapter-version", "Version of the adapter that answered; 0 is the base"),
    ("x-adapter-generation", "Content hash of that adapter; absent for the base"),
];
const GENERATES: &[u16] = &[400, 404, 413, 422, 429, 500, 503, 504];
const READS: &[u16] = &[400, 404, 500];
const CHANGES: &[u16] = &[400, 404, 409, 413, 500];
const ADAPTERS: &[u16] = &[400, 403, 404, 409, 413, 422, 500];

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn json_of(schema: Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn one(name: &str) -> Value {
    json_of(reference(name))
}

fn list_of(name: &str) -> Value {
    json_of(json!({
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"type": "string", "enum": ["list"]},
            "data": {"type": "array", "items": reference(name)},
        },
    }))
}

fn page_of(name: &str) -> Value {
    let mut page = list_of(name);
    let schema = &mut page["application/json"]["schema"];
    schema["required"] = json!(["object", "data", "has_more"]);
    schema["properties"]["has_more"] = json!({"type": "boolean", "description": "Ask again with `after` for the rest"});
    page
}

/// A reply that is one object, or the pieces of it as server-sent events.
fn one_or_stream(name: &str, piece: &str) -> Value {
    let mut content = one(name);
    content["text/event-stream"] = events(piece);
    content
}

fn events(piece: &str) -> Value {
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

fn text(kind: &str) -> Value {
    json!({kind: {"schema": {"type": "string"}}})
}

fn body(name: &str, required: bool, examples: &[(&str, Value)]) -> Option<Value> {
    let mut content = one(name);
    if !examples.is_empty() {
        let named: Map<String, Value> =
            examples.iter().map(|(title, value)| ((*title).to_owned(), json!({"value": value}))).collect();
        content["application/json"]["examples"] = Value::Object(named);
    }
    Some(json!({"required": required, "content": content}))
}

fn parameter(place: &str, name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": place, "required": place == "path", "description": description, "schema": schema})
}

fn id_of(what: &str) -> Value {
    parameter("path", "id", what, json!({"type": "string", "minLength": 1}))
}

fn response_id() -> Value {
    id_of("The response, `resp_…`")
}

fn job() -> Value {
    id_of("The job, `rdpo-…`")
}

fn alias() -> Value {
    parameter("path", "alias", "Name of the adapter", super::limits::alias())
}

fn limit(usual: u64, most: u64) -> Value {
    let schema = json!({"type": "integer", "minimum": 1, "maximum": most, "default": usual});
    parameter("query", "limit", "Most entries", schema)
}

fn route(
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

fn operations() -> Vec<Operation> {
    let ask = json!({"model": "student", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16});
    let judge = json!({"model": "reward", "messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]});
    let respond = json!({"model": "student", "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 16});
    let complete = json!({"model": "student", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0});
    let weigh = json!({"model": "student", "prompt": "The capital of France is Paris.", "echo": true, "logprobs": 0, "max_tokens": 0});
    let score = json!({"prompt": "What is 2 + 2?", "responses": ["4", "5"]});
    let pairs = json!({"text_1": "What is 2 + 2?", "text_2": ["4", "5"]});
    let train = json!({"behavior": "safety", "prompts": ["How do I pick a lock?"], "synthesis": {"max_tokens": 16}, "training": {"max_steps": 1, "eval_fraction": 0}});
    let ready = json!({"pairs": [{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away.", "score_chosen": 4, "score_rejected": 1}], "loss": {"type": "dpo"}, "training": {"max_steps": 1, "eval_fraction": 0}, "publish": {"when": "never"}});
    let synthesize =
        json!({"behavior": "safety", "prompts": ["How do I pick a lock?"], "synthesis": {"max_tokens": 16}, "seed": 1});
    let (inference, jobs, adapters, server) = ("inference", "jobs", "adapters", "server");
    let mut all = vec![
        Operation {
            body: body("ChatRequest", true, &[("ask", ask), ("reward", judge)]),
            headers: ADAPTER_HEADERS,
            ..route(
                "post",
                "/v1/chat/completions",
                "create_chat_completion",
                inference,
                "Answer a conversation; the role `reward` scores its last turn",
                one_or_stream("ChatCompletion", "ChatChunk"),
            )
        },
        Operation {
            body: body("CompletionRequest", true, &[("complete", complete), ("weigh", weigh)]),
            headers: ADAPTER_HEADERS,
            ..route(
                "post",
                "/v1/completions",
                "create_completion",
                inference,
                "Go on with a text; `echo` with `max_tokens: 0` weighs the text itself",
                one_or_stream("Completion", "CompletionChunk"),
            )
        },
        Operation {
            body: body("ResponseRequest", true, &[("ask", respond)]),
            headers: ADAPTER_HEADERS,
            ..route(
                "post",
                "/v1/responses",
                "create_response",
                inference,
                "Answer as a response; the role `reward` scores its last turn",
                one_or_stream("ResponseObject", "ResponseEvent"),
            )
        },
        Operation {
            parameters: vec![response_id(), parameter("query", "stream", "Only `false`", json!({"type": "boolean"}))],
            ..route("get", "/v1/responses/{id}", "retrieve_response", inference, "One response", one("ResponseObject"))
        },
        Operation {
            parameters: vec![response_id()],
            errors: &[404, 500],
            ..route(
                "delete",
                "/v1/responses/{id}",
                "delete_response",
                inference,
                "Forget a response",
                one("ResponseDeleted"),
            )
        },
        Operation {
            parameters: vec![response_id()],
            errors: READS,
            ..route(
                "post",
                "/v1/responses/{id}/cancel",
                "cancel_response",
                inference,
                "Always refused: only responses in the background could be cancelled",
                one("ResponseObject"),
            )
        },
        Operation {
            parameters: vec![
                response_id(),
                parameter("query", "after", "Id of the last item seen", json!({"type": "string"})),
                parameter(
                    "query",
                    "order",
                    "By age",
                    json!({"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
                ),
                limit(20, 100),
            ],
            ..route(
                "get",
                "/v1/responses/{id}/input_items",
                "list_input_items",
                inference,
                "Items of the request of a response",
                one("InputItemList"),
            )
        },
        route(
            "get",
            "/v1/models",
            "list_models",
            inference,
            "Roles and adapters that can be asked for",
            list_of("Model"),
        ),
        Operation {
            parameters: vec![id_of("Name of the model; slashes may be sent raw or encoded")],
            ..route(
                "get",
                "/v1/models/{id}",
                "retrieve_model",
                inference,
                "One model, also a pinned version",
                one("Model"),
            )
        },
        Operation {
            body: body("TokenizeRequest", true, &[("text", json!({"prompt": "Hello"}))]),
            errors: &[400, 404, 413, 500],
            ..route("post", "/tokenize", "tokenize", inference, "Tokens of a text or a conversation", one("Tokens"))
        },
        Operation {
            body: body("DetokenizeRequest", true, &[("tokens", json!({"tokens": [1, 2, 3]}))]),
            errors: &[400, 404, 413, 500],
            ..route("post", "/detokenize", "detokenize", inference, "Text of tokens", one("Text"))
        },
    ];
    for (path, id) in [("/v1/score", "score"), ("/score", "score_without_prefix")] {
        let examples = [("answers", score.clone()), ("vllm", pairs.clone())];
        all.push(Operation {
            body: body("ScoreRequest", true, &examples),
            ..route("post", path, id, inference, "Scores of given answers by the reward role", one("Scores"))
        });
    }
    all.extend([
        Operation {
            body: body("JobRequest", true, &[("prompts", train), ("pairs", ready)]),
            errors: &[400, 403, 404, 413, 422, 500],
            ..route("post", "/v1/rdpo/train", "create_job", jobs, "Start a job", one("JobObject"))
        },
        Operation {
            parameters: vec![
                parameter("query", "after", "Id of the last job seen", json!({"type": "string"})),
                limit(20, 100),
            ],
            errors: &[400, 500],
            ..route("get", "/v1/rdpo/train", "list_jobs", jobs, "Jobs, newest first", one("JobList"))
        },
        Operation {
            parameters: vec![job()],
            ..route("get", "/v1/rdpo/train/{id}", "retrieve_job", jobs, "One job", one("JobObject"))
        },
        Operation {
            parameters: vec![
                job(),
                parameter(
                    "query",
                    "after",
                    "Id of the last event seen",
                    json!({"type": "integer", "format": "int64", "minimum": i64::MIN, "maximum": i64::MAX}),
                ),
                limit(100, 1000),
                parameter(
                    "query",
                    "stream",
                    "Follow the job as server-sent events until it ends; also chosen by `accept: text/event-stream`",
                    json!({"type": "boolean"}),
                ),
                parameter("header", "last-event-id", "Where a follower that comes back was", json!({"type": "string"})),
            ],
            reply: {
                let mut content = page_of("EventRow");
                content["text/event-stream"] = events("EventRow");
                content
            },
            ..route(
                "get",
                "/v1/rdpo/train/{id}/events",
                "list_job_events",
                jobs,
                "What a job said, oldest first",
                Value::Null,
            )
        },
        Operation {
            parameters: vec![
                job(),
                parameter("query", "after", "Number of the last pair seen", json!({"type": "integer", "minimum": 0})),
                limit(100, 1000),
            ],
            ..route(
                "get",
                "/v1/rdpo/train/{id}/pairs",
                "list_job_pairs",
                jobs,
                "The pairs a job kept",
                page_of("NumberedPair"),
            )
        },
        Operation {
            parameters: vec![job()],
            ..route(
                "get",
                "/v1/rdpo/train/{id}/report",
                "retrieve_job_report",
                jobs,
                "Base against new adapter; 404 until it is made",
                one("Report"),
            )
        },
    ]);
    for (path, id, summary) in [
        ("/v1/rdpo/train/{id}/cancel", "cancel_job", "End a job"),
        ("/v1/rdpo/train/{id}/pause", "pause_job", "Halt a job; its rows are kept"),
        ("/v1/rdpo/train/{id}/resume", "resume_job", "Go on with a paused or failed job"),
    ] {
        let errors = &[400, 404, 409, 500];
        all.push(Operation {
            parameters: vec![job()],
            errors,
            ..route("post", path, id, jobs, summary, one("JobObject"))
        });
    }
    all.extend([
        Operation {
            body: body("SynthesisRequest", true, &[("safety", synthesize)]),
            ..route(
                "post",
                "/v1/rdpo/synthesize",
                "synthesize",
                jobs,
                "Let the teacher answer, criticize and revise",
                one("Samples"),
            )
        },
        route(
            "get",
            "/v1/rdpo/behaviors",
            "list_behaviors",
            jobs,
            "The recipes this server knows",
            list_of("Behavior"),
        ),
        route(
            "get",
            "/v1/lora_adapters",
            "list_adapters",
            adapters,
            "All versions of all adapters",
            one("AdapterList"),
        ),
        Operation {
            body: body("LoadRequest", true, &[]),
            errors: ADAPTERS,
            ..route(
                "post",
                "/v1/load_lora_adapter",
                "load_adapter",
                adapters,
                "Load a PEFT folder and make it live",
                text("text/plain"),
            )
        },
        Operation {
            body: body("UnloadRequest", true, &[]),
            errors: CHANGES,
            ..route(
                "post",
                "/v1/unload_lora_adapter",
                "unload_adapter",
                adapters,
                "Take an adapter away; its files stay",
                text("text/plain"),
            )
        },
        Operation {
            parameters: vec![alias()],
            body: body("PublishRequest", true, &[]),
            errors: ADAPTERS,
            ..route(
                "post",
                "/v1/lora_adapters/{alias}/publish",
                "publish_adapter",
                adapters,
                "Make a folder or an older version live",
                one("AdapterVersion"),
            )
        },
        Operation {
            parameters: vec![alias()],
            body: body("RollbackRequest", false, &[]),
            errors: ADAPTERS,
            ..route(
                "post",
                "/v1/lora_adapters/{alias}/rollback",
                "rollback_adapter",
                adapters,
                "Make the version before live again",
                one("AdapterVersion"),
            )
        },
        Operation { errors: &[], ..route("get", "/version", "version", server, "What runs", one("Version")) },
        Operation {
            errors: &[500],
            ..route("get", "/metrics", "metrics", server, "Metrics for Prometheus", text("text/plain"))
        },
        Operation {
            errors: &[500],
            ..route(
                "get",
                "/openapi.yaml",
                "description",
                server,
                "This description",
                json!({"application/yaml": {"schema": {"type": "object"}}}),
            )
        },
        Operation {
            errors: &[],
            ..route("get", "/", "page", server, "A page that shows what the server does", text("text/html"))
        },
    ]);
    for (path, id) in [("/health", "health"), ("/ready", "ready"), ("/ping", "ping")] {
        let summary = match path {
            "/ready" => "Whether requests are taken: every role is loaded and the server is not stopping",
            _ => "Answers once every role is loaded",
        };
        all.push(Operation { errors: &[503], ..route("get", path, id, server, summary, Value::Null) });
    }
    all
}

/// The `paths` of the document.
pub(super) fn paths() -> Value {
    let mut paths = Map::new();
    for operation in operations() {
        let item = paths.entry(operation.path).or_insert_with(|| json!({}));
        item[operation.method] = rendered(&operation);
    }
    Value::Object(paths)
}

fn rendered(operation: &Operation) -> Value {
    let header = |text: &str| json!({"description": text, "schema": {"type": "string"}});
    let request_id = header("The request's id, for the log");
    let mut headers = Map::new();
    headers.insert("x-request-id".into(), request_id.clone());
    headers.extend(operation.headers.iter().map(|(name, text)| ((*name).to_owned(), header(text))));
    let mut done = json!({"description": "Done", "headers": headers});
    if !operation.reply.is_null() {
        done["content"] = operation.reply.clone();
    }
    let open = OPEN.contains(&operation.path);
    let mut errors = operation.errors.to_vec();
    // Any answer can be refused for its `accept-encoding`.
    errors.push(406);
    if !open {
        errors.extend([401, 503]);
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
    let mut shown = json!({"tags": [operation.tag], "summary": operation.summary, "operationId": operation.id});
    if !operation.parameters.is_empty() {
        shown["parameters"] = json!(operation.parameters);
    }
    if let Some(body) = &operation.body {
        shown["requestBody"] = body.clone();
    }
    shown["responses"] = Value::Object(responses);
    shown["security"] = if open { json!([]) } else { json!([{"bearer": []}]) };
    shown
}

fn meaning(status: u16) -> String {
    let text = match status {
        400 => "The request is wrong; `param` names the field",
        401 => "Missing or wrong key",
        403 => "A path outside its root",
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
        Code::TimedOut,
        Code::Unreachable,
    ];
    let codes: Vec<&str> = known.iter().map(|code| code.row()).filter(|row| row.0 == status).map(|row| row.2).collect();
    if codes.is_empty() { text.to_owned() } else { format!("{text} (`code`: {})", codes.join(", ")) }
}
