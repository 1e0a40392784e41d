//! The description of the API, `openapi.yaml`: made from the types that requests are read into and replies are written from.
//!
//! `make openapi` writes the file; a test fails where it differs from what is made here.

mod limits;
mod operation;
mod operations;
mod replies;
mod response_replies;

use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{OpenApi, RefOr, Schema};

use super::reply::ErrorReply;
pub use super::routes::configured_routes;
use super::routes::{adapters, chat, completions, models, rdpo, responses, score, status, tokenize};
use super::sampling::Sampling;
use crate::error::{Error, Result};
use crate::jobs::EventRow;
use crate::rdpo::{Behavior, BehaviorRef, JobRequest, PromptInput, Report, SynthesisOptions};

/// The whole description.
pub fn document() -> Result<OpenApi> {
    let mut schemas = schemas()?;
    limits::apply(&mut schemas)?;
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "rdpo",
            "description": "Serves a language model and aligns it at the same time: OpenAI's routes for the roles `teacher`, `reward` and \
                `student`, refined-DPO jobs that train the student while it serves, and its adapters. Fields of OpenAI's API that are not \
                listed are taken and have no effect, except on `/v1/rdpo/…` and adapter routes, which refuse what they do not know. \
                Every reply carries `x-request-id`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": env!("CARGO_PKG_VERSION"),
        },
        "servers": [{"url": "/", "description": "This server"}],
        "tags": [
            {"name": "inference", "description": "OpenAI's routes and vLLM's additions"},
            {"name": "jobs", "description": "Refined DPO: synthesize, score, train, compare, publish"},
            {"name": "adapters", "description": "Versions of LoRA adapters"},
            {"name": "server", "description": "Health, metrics, this description; open without a key"},
        ],
        "paths": operations::paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "One of `server.api_keys`; not asked for where there are none."},
            },
        },
    });
    serde_json::from_value(document).map_err(|error| Error::internal(format!("the description is no OpenAPI: {error}")))
}

/// The description as `openapi.yaml` has it.
pub fn yaml() -> Result<String> {
    let text = document()?.to_yaml().map_err(|error| Error::internal(error.to_string()))?;
    Ok(format!("# Made from the code by `make openapi`; do not edit.\n{text}"))
}

type Named = (String, RefOr<Schema>);

fn add<T: ToSchema>(all: &mut Vec<Named>) {
    T::schemas(all);
    all.push((T::name().into_owned(), T::schema()));
}

fn schemas() -> Result<Map<String, Value>> {
    let mut all: Vec<Named> = Vec::new();
    add::<ErrorReply>(&mut all);
    add::<chat::ChatRequest>(&mut all);
    add::<completions::CompletionRequest>(&mut all);
    add::<Sampling>(&mut all);
    add::<replies::ChatCompletion>(&mut all);
    add::<replies::ChatChunk>(&mut all);
    add::<replies::Completion>(&mut all);
    add::<replies::CompletionChunk>(&mut all);
    add::<responses::ResponseRequest>(&mut all);
    add::<responses::InputItem>(&mut all);
    add::<response_replies::ResponseObject>(&mut all);
    add::<response_replies::ResponseEvent>(&mut all);
    add::<response_replies::ResponseDeleted>(&mut all);
    add::<response_replies::InputItemList>(&mut all);
    add::<models::Model>(&mut all);
    add::<tokenize::TokenizeRequest>(&mut all);
    add::<tokenize::Tokens>(&mut all);
    add::<tokenize::DetokenizeRequest>(&mut all);
    add::<tokenize::Text>(&mut all);
    add::<score::ScoreRequest>(&mut all);
    add::<score::Scores>(&mut all);
    add::<JobRequest>(&mut all);
    add::<PromptInput>(&mut all);
    add::<BehaviorRef>(&mut all);
    add::<SynthesisOptions>(&mut all);
    add::<rdpo::JobObject>(&mut all);
    add::<rdpo::JobList>(&mut all);
    add::<rdpo::NumberedPair>(&mut all);
    add::<rdpo::Samples>(&mut all);
    add::<EventRow>(&mut all);
    add::<Report>(&mut all);
    add::<Behavior>(&mut all);
    add::<adapters::LoadRequest>(&mut all);
    add::<adapters::UnloadRequest>(&mut all);
    add::<adapters::PublishRequest>(&mut all);
    add::<adapters::RollbackRequest>(&mut all);
    add::<adapters::AdapterVersion>(&mut all);
    add::<adapters::AdapterList>(&mut all);
    add::<status::Version>(&mut all);
    let mut schemas = Map::new();
    for (name, schema) in all {
        schemas.insert(name, serde_json::to_value(schema)?);
    }
    // The rules of the fields describe it in place.
    schemas.remove("Stop");
    // A completion's body is read in two parts, its own fields and the sampling fields; the client sees one object.
    let sampling = schemas.remove("Sampling").unwrap_or_default();
    for name in ["ChatRequest", "CompletionRequest", "ResponseRequest"] {
        let Some(properties) = schemas.get_mut(name).and_then(|schema| schema["properties"].as_object_mut()) else {
            continue;
        };
        properties.extend(sampling["properties"].as_object().cloned().unwrap_or_default());
        properties.extend(limits::refused_fields());
        if name == "ResponseRequest" {
            properties.retain(|field, _| !["prompt_logprobs", "return_token_ids"].contains(&field.as_str()));
        }
    }
    schemas.sort_keys();
    Ok(schemas)
}
