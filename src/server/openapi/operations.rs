//! Every route: what it takes, what it answers, how it fails.

use serde_json::{Map, Value, json};

use super::operation::{
    ADAPTER_HEADERS, ADAPTERS, CHANGES, Operation, READS, alias, body, events, id_of, job, limit, list_of, one,
    one_or_stream, page_of, parameter, response_id, route, text,
};

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
        item[operation.method] = operation.rendered();
    }
    Value::Object(paths)
}
