//! Ranges and forms that the server checks after reading a type, and fields it reads without one.

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::rdpo::JobRequest;

/// Form of an adapter's name.
pub(super) fn alias() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"})
}

/// `tool_choice`, in the form of chats and of responses.
fn tool_choice() -> Value {
    let text = json!({"type": "string", "minLength": 1});
    let kind = |name: &str| json!({"type": "string", "enum": [name]});
    let object =
        |required: Value, properties: Value| json!({"type": "object", "required": required, "properties": properties});
    let nested = object(json!(["name"]), json!({"name": text}));
    let function = json!({"anyOf": [
        object(json!(["type", "function"]), json!({"type": kind("function"), "function": nested})),
        object(json!(["type", "name"]), json!({"type": kind("function"), "name": text})),
    ]});
    let allowed = json!({"mode": {"type": "string", "enum": ["auto", "required"]}, "tools": {"type": "array", "minItems": 1, "items": function}});
    let mut flat = allowed.clone();
    flat["type"] = kind("allowed_tools");
    let allowed = object(json!(["mode", "tools"]), allowed);
    json!({"type": null, "anyOf": [
        {"type": ["string", "null"], "enum": ["none", "auto", "required", null]},
        function,
        object(json!(["type", "allowed_tools"]), json!({"type": kind("allowed_tools"), "allowed_tools": allowed})),
        object(json!(["type", "mode", "tools"]), flat),
    ]})
}

/// What is added to the schema of a type's field.
fn rules() -> Vec<(&'static str, &'static str, Value)> {
    // Every linear that can have an adapter has one by default.
    let sites = JobRequest::default().lora.target_modules;
    let text = json!({"minLength": 1, "pattern": r"\S"});
    let above_zero = json!({"exclusiveMinimum": 0});
    let from_zero = json!({"minimum": 0});
    let at_least_one = json!({"minimum": 1});
    let messages = json!({"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"}});
    let token_ids = json!({"items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}});
    let function_name = json!({"type": "string", "pattern": r"^[^\u0000-\u001f\u007f-\u009f]+$"});
    let most_tools = json!({"maxItems": 1024});
    let items = json!({"type": "array", "items": {"$ref": "#/components/schemas/InputItem"}});
    let input = json!({"type": null, "oneOf": [{"type": "string"}, items]});
    let mut rules = vec![
        ("ChatMessage", "role", json!({"enum": ["system", "developer", "user", "assistant", "tool"]})),
        ("ChatRequest", "messages", messages),
        ("Part", "type", json!({"enum": ["text", "input_text", "output_text", "refusal"]})),
        ("Part", "text", json!({"type": "string"})),
        ("ChatRequest", "max_completion_tokens", at_least_one.clone()),
        ("ChatRequest", "max_tokens", at_least_one.clone()),
        ("ResponseFormat", "type", json!({"enum": ["text", "json_object", "json_schema"]})),
        ("NamedSchema", "schema", json!({"type": ["object", "boolean"]})),
        ("StructuredOutputs", "json", json!({"type": ["object", "boolean", "string", "null"]})),
        ("StructuredOutputs", "choice", json!({"minItems": 1, "items": {"type": "string", "minLength": 1}})),
        ("ChatRequest", "tool_choice", tool_choice()),
        ("ChatTool", "type", json!({"enum": ["function"]})),
        ("ChatTool", "function", json!({"oneOf": null, "$ref": "#/components/schemas/Function"})),
        ("FlatTool", "type", json!({"enum": ["function"]})),
        ("FlatTool", "name", function_name.clone()),
        ("Function", "name", function_name),
        ("CalledFunction", "arguments", json!({"type": ["string", "object", "null"]})),
        ("ResponseRequest", "input", input),
        ("ResponseRequest", "tool_choice", tool_choice()),
        ("ChatRequest", "tools", most_tools.clone()),
        ("ResponseRequest", "tools", most_tools.clone()),
        ("TokenizeRequest", "tools", most_tools),
        ("ResponseRequest", "max_output_tokens", at_least_one.clone()),
        ("ResponseRequest", "max_tokens", at_least_one.clone()),
        ("ResponseRequest", "n", json!({"maximum": 1})),
        ("ResponseRequest", "best_of", json!({"maximum": 1})),
        ("ResponseRequest", "background", json!({"enum": [false, null]})),
        ("ResponseRequest", "conversation", json!({"type": "null"})),
        ("ResponseRequest", "prompt", json!({"type": "null"})),
        (
            "TextOptions",
            "format",
            json!({"required": ["type"], "properties": {
                "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
                "schema": {"type": ["object", "boolean", "null"]},
            }}),
        ),
        ("InputItem", "type", json!({"enum": ["message", "function_call", "function_call_output", "reasoning", null]})),
        ("InputItem", "role", json!({"enum": ["system", "developer", "user", "assistant", null]})),
        ("ResponseObject", "tool_choice", json!({"type": ["string", "object"]})),
        ("DetokenizeRequest", "tokens", token_ids.clone()),
        (
            "ScoreRequest",
            "behavior",
            json!({"type": null, "oneOf": [{"type": "null"}, {"$ref": "#/components/schemas/BehaviorRef"}]}),
        ),
        ("ScoreRequest", "responses", json!({"minItems": 1, "maxItems": 1024})),
        ("LoadRequest", "lora_name", alias()),
        ("LoadRequest", "lora_path", text.clone()),
        ("LoadRequest", "is_3d_lora_weight", json!({"enum": [false]})),
        ("LoadRequest", "model", json!({"enum": ["student", null]})),
        ("UnloadRequest", "lora_name", text.clone()),
        ("JobRequest", "student", json!({"enum": ["student"]})),
        ("JobRequest", "prompts_file", text.clone()),
        ("JobRequest", "seed", json!({"format": null, "minimum": 0, "maximum": u64::MAX})),
        ("SynthesisOptions", "rounds", json!({"minimum": 1, "maximum": 4})),
        ("SynthesisOptions", "samples_per_prompt", json!({"minimum": 1, "maximum": 64})),
        ("SynthesisOptions", "max_tokens", json!({"minimum": 1, "maximum": 131_072})),
        ("SynthesisOptions", "temperature", json!({"minimum": 0, "maximum": 2})),
        ("SynthesisOptions", "top_p", json!({"exclusiveMinimum": 0, "maximum": 1})),
        ("ScoringOptions", "reward", json!({"enum": ["reward"]})),
        ("PublishRequire", "win_rate", json!({"minimum": 0, "maximum": 1})),
        ("PublishOptions", "alias", alias()),
        ("LossOptions", "beta", above_zero.clone()),
        ("LossOptions", "score_weight", from_zero.clone()),
        (
            "LossOptions",
            "score_scale",
            json!({"type": null, "oneOf": [{"type": "string", "enum": ["auto"]}, {"type": "number", "exclusiveMinimum": 0}]}),
        ),
        ("LossOptions", "score_clip", above_zero.clone()),
        ("LossOptions", "label_smoothing", json!({"minimum": 0, "exclusiveMaximum": 0.5})),
        ("LossOptions", "temperature", above_zero.clone()),
        ("LoraOptions", "r", json!({"minimum": 1, "maximum": 256})),
        ("LoraOptions", "alpha", above_zero.clone()),
        ("LoraOptions", "dropout", json!({"minimum": 0, "exclusiveMaximum": 1})),
        (
            "LoraOptions",
            "target_modules",
            json!({"minItems": 1, "uniqueItems": true, "items": {"type": "string", "enum": sites}}),
        ),
        ("TrainingOptions", "epochs", json!({"exclusiveMinimum": 0, "maximum": 10_000})),
        ("TrainingOptions", "max_steps", at_least_one.clone()),
        ("TrainingOptions", "batch_size", json!({"minimum": 1, "maximum": 4096})),
        ("TrainingOptions", "gradient_accumulation_steps", json!({"minimum": 1, "maximum": 4096})),
        ("TrainingOptions", "learning_rate", above_zero.clone()),
        ("TrainingOptions", "loraplus_lr_ratio", above_zero.clone()),
        ("TrainingOptions", "eval_steps", at_least_one.clone()),
        ("TrainingOptions", "early_stopping_patience", at_least_one.clone()),
        (
            "LoraOptions",
            "rank_pattern",
            json!({"additionalProperties": {"type": "integer", "minimum": 1, "maximum": 256}}),
        ),
        ("LoraOptions", "alpha_pattern", json!({"additionalProperties": {"type": "number", "exclusiveMinimum": 0}})),
        ("TrainingOptions", "warmup_ratio", json!({"minimum": 0, "exclusiveMaximum": 1})),
        ("TrainingOptions", "weight_decay", from_zero.clone()),
        ("TrainingOptions", "max_grad_norm", from_zero),
        ("TrainingOptions", "max_length", json!({"minimum": 2})),
        ("TrainingOptions", "checkpoint_steps", at_least_one.clone()),
        ("TrainingOptions", "eval_fraction", json!({"minimum": 0, "maximum": 0.5})),
        ("TrainingOptions", "activation_memory", json!({"pattern": r"^\s*[0-9.]+\s*([kKMGT]?B|[KMGT]iB)?\s*$"})),
        ("Rubric", "prompt", json!({"pattern": r"\{prompt\}[\s\S]*\{response\}|\{response\}[\s\S]*\{prompt\}"})),
        ("Rubric", "max_tokens", at_least_one),
    ];
    for field in ["name", "principle", "critique", "revision", "context"] {
        rules.push(("Behavior", field, text.clone()));
    }
    for field in ["chosen", "rejected"] {
        rules.push(("PairInput", field, text.clone()));
    }
    for name in ["ChatRequest", "CompletionRequest", "ResponseRequest"] {
        let stop = json!({"type": "string", "minLength": 1, "maxLength": 4096});
        let stops = json!({"type": "array", "maxItems": 16, "items": stop});
        rules.push((name, "stop", json!({"oneOf": [{"type": "null"}, stop, stops]})));
        rules.push((name, "seed", json!({"minimum": i64::MIN, "maximum": i64::MAX})));
        rules.push((
            name,
            "logit_bias",
            json!({"propertyNames": {"type": "string", "pattern": "^[0-9]+$"}, "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
        ));
        rules.push((name, "stop_token_ids", token_ids.clone()));
        let some_ids = json!({"minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}});
        rules.push((name, "allowed_token_ids", some_ids));
        rules.push((
            name,
            "bad_words",
            json!({"maxItems": 1000, "items": {"type": "string", "pattern": r"\S", "maxLength": 4096}}),
        ));
        rules.push((name, "truncate_prompt_tokens", json!({"not": {"const": 0}, "maximum": i64::MAX})));
        rules.push((name, "priority", json!({"minimum": i64::MIN, "maximum": i64::MAX})));
    }
    rules
}

/// Adds the rules to the schemas, and the schemas that no type stands for.
pub(super) fn apply(schemas: &mut Map<String, Value>) -> Result<()> {
    for (name, field, rule) in rules() {
        let place = schemas.get_mut(name).and_then(|schema| schema["properties"].get_mut(field));
        let place = place.and_then(Value::as_object_mut);
        let place = place.ok_or_else(|| Error::internal(format!("no field {name}.{field} to describe")))?;
        for (key, value) in rule.as_object().into_iter().flatten() {
            match value {
                // A rule that says `null` takes the key away.
                Value::Null => place.remove(key),
                value => place.insert(key.clone(), value.clone()),
            };
        }
    }
    for (name, required) in
        [("Part", ["type", "text"]), ("ChatTool", ["type", "function"]), ("FlatTool", ["type", "name"])]
    {
        if let Some(schema) = schemas.get_mut(name) {
            schema["required"] = json!(required);
        }
    }
    let turn = json!({
        "type": "object",
        "description": "A turn of a prompt.",
        "required": ["role", "content"],
        "additionalProperties": false,
        "properties": {
            "role": {"type": "string", "enum": ["system", "user", "assistant"]},
            "content": {"type": "string"},
            "name": {"type": ["string", "null"]},
        },
    });
    schemas.insert("Turn".into(), turn);
    let prompt = json!({
        "description": "A text, or turns that end in the user's.",
        "oneOf": [
            {"type": "string", "minLength": 1, "pattern": r"\S"},
            {
                "type": "object",
                "required": ["messages"],
                "additionalProperties": false,
                "properties": {"messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Turn"}}},
            },
        ],
    });
    schemas.insert("PromptInput".into(), prompt);
    let synthesis = json!({
        "type": "object",
        "description": "Prompts for self-critique; `prompts` × `synthesis.samples_per_prompt` is at most 256.",
        "required": ["prompts"],
        "additionalProperties": false,
        "properties": {
            "behavior": schemas["JobRequest"]["properties"]["behavior"],
            "prompts": {"type": "array", "minItems": 1, "maxItems": 256, "items": {"$ref": "#/components/schemas/PromptInput"}},
            "synthesis": {"$ref": "#/components/schemas/SynthesisOptions"},
            "seed": schemas["JobRequest"]["properties"]["seed"],
        },
    });
    schemas.insert("SynthesisRequest".into(), synthesis);
    Ok(())
}

/// Fields of OpenAI's and vLLM's bodies that would change the answer and are not there: only what asks for nothing is taken.
pub(super) fn refused_fields() -> Map<String, Value> {
    let nothing = |name: &str| (name.to_owned(), json!({"type": "null", "description": "Refused."}));
    let mut fields: Map<String, Value> = [
        "functions",
        "function_call",
        "audio",
        "logits_processors",
        "logprob_token_ids",
        "prompt_embeds",
        "repetition_detection",
        "thinking_token_budget",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ]
    .map(nothing)
    .into_iter()
    .collect();
    let mut add = |name: &str, text: &str, schema: Value| {
        let mut schema = schema;
        schema["description"] = json!(text);
        fields.insert(name.to_owned(), schema);
    };
    add("modalities", "Only text.", json!({"type": ["array", "null"], "items": {"type": "string", "enum": ["text"]}}));
    add("suffix", "Only the empty one.", json!({"type": ["string", "null"], "maxLength": 0}));
    for name in ["use_beam_search", "return_tokens_as_token_ids", "return_weight_versions"] {
        add(name, "Only false.", json!({"type": ["boolean", "null"], "enum": [false, null]}));
    }
    fields
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_web::web::Bytes;

    use super::*;
    use crate::roles::GenerationDefaults;
    use crate::server::openapi::document;
    use crate::server::reply::parse;
    use crate::server::sampling::Sampling;

    /// Values at the ends of a schema's range, and values just outside.
    fn ends(schema: &Value) -> (Vec<Value>, Vec<Value>) {
        let whole = schema["type"] == "integer" || schema["type"][0] == "integer";
        let step = |value: f64, by: f64| if whole { json!((value + by) as i64) } else { json!(value + by) };
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        let small = if whole { 1.0 } else { 1e-3 };
        for (key, sign) in [("minimum", -small), ("maximum", small)] {
            // Ends of a machine's own numbers are the type's business.
            if let Some(end) = schema[key].as_f64().filter(|end| end.abs() < 1e9) {
                inside.push(schema[key].clone());
                outside.push(step(end, sign));
            }
        }
        for key in ["exclusiveMinimum", "exclusiveMaximum"] {
            outside.extend(schema.get(key).cloned());
        }
        (inside, outside)
    }

    #[test]
    fn ranges_of_a_job_are_the_enforced_ones() {
        let document = serde_json::to_value(document().unwrap()).unwrap();
        let schemas = &document["components"]["schemas"];
        let mut checked = 0;
        for (section, name) in [
            ("synthesis", "SynthesisOptions"),
            ("loss", "LossOptions"),
            ("lora", "LoraOptions"),
            ("training", "TrainingOptions"),
        ] {
            for (field, schema) in schemas[name]["properties"].as_object().unwrap() {
                let (inside, outside) = ends(schema);
                // Patience counts evaluations, so there must be some.
                let read = |value: &Value| {
                    let mut fields = json!({field: value});
                    if field == "early_stopping_patience" {
                        fields["eval_steps"] = json!(1);
                    }
                    JobRequest::parse(&json!({"prompts": ["a"], section: fields}))
                };
                for value in inside {
                    read(&value).unwrap_or_else(|error| panic!("{section}.{field} = {value}: {error}"));
                }
                for value in outside {
                    let error = read(&value).expect_err(&format!("{section}.{field} = {value}"));
                    assert_eq!(error.param, Some(format!("{section}.{field}")), "{value}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 25, "{checked}");
    }

    #[test]
    fn ranges_of_sampling_are_the_enforced_ones() {
        let document = serde_json::to_value(document().unwrap()).unwrap();
        let mut checked = 0;
        let read = |field: &str, value: &Value| -> Result<()> {
            let sampling: Sampling = parse(&Bytes::from(json!({field: value}).to_string()))?;
            sampling.params(&GenerationDefaults::default())?;
            sampling.n().map(drop)
        };
        let own = ["logprobs", "best_of", "min_tokens"];
        let fields = document["components"]["schemas"]["CompletionRequest"]["properties"].as_object().unwrap();
        for (field, schema) in fields.iter().filter(|(field, _)| !own.contains(&field.as_str())) {
            let (inside, outside) = ends(schema);
            for value in inside {
                read(field, &value).unwrap_or_else(|error| panic!("{field} = {value}: {error}"));
            }
            for value in outside {
                let error = read(field, &value).expect_err(&format!("{field} = {value}"));
                assert_eq!(error.param.as_deref(), Some(field.as_str()), "{value}");
                checked += 1;
            }
        }
        assert!(checked > 12, "{checked}");
    }
}
