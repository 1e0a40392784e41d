//! `GET /v1/models` and `/v1/models/{id}`.

use actix_web::{HttpResponse, web};
use serde::Serialize;
use utoipa::ToSchema;

use super::{List, Routes, resolve};
use crate::error::Error;
use crate::roles::ModelCard;
use crate::server::AppState;
use crate::server::reply::Reply;

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.get("/v1/models", list);
    // Names may hold slashes.
    routes.get("/v1/models/{id:.+}", get);
}

/// A model that can be asked for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    /// The name to ask for.
    id: String,
    /// `model`.
    object: &'static str,
    /// Unix seconds.
    created: i64,
    /// `rdpo`.
    owned_by: &'static str,
    /// Path of the checkpoint or the adapter, a remote model's name at its endpoint, or the kind of a reward without a model.
    root: String,
    /// The model an adapter stands on.
    #[schema(required)]
    parent: Option<String>,
    /// Longest prompt and answer together, tokens; 0 where the model is remote or there is none.
    max_model_len: usize,
    /// Version of the adapter that answers; 0 is the base.
    #[schema(required)]
    adapter_version: Option<u64>,
    /// Content hash of that adapter.
    #[schema(required)]
    adapter_generation: Option<String>,
}

impl From<ModelCard> for Model {
    fn from(card: ModelCard) -> Self {
        Model {
            id: card.id,
            object: "model",
            created: card.created,
            owned_by: "rdpo",
            root: card.root,
            parent: card.parent,
            max_model_len: card.max_model_len,
            adapter_version: card.adapter_version,
            adapter_generation: card.adapter_generation,
        }
    }
}

async fn list(state: web::Data<AppState>) -> HttpResponse {
    HttpResponse::Ok().json(List::new(state.roles.list().into_iter().map(Model::from).collect()))
}

async fn get(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let id = id.into_inner();
    let listed = state.roles.list();
    let created = listed.first().map_or(0, |card| card.created);
    if let Some(found) = listed.into_iter().find(|card| card.id == id) {
        return Ok(HttpResponse::Ok().json(Model::from(found)));
    }
    // A pinned version is not in the list but can be asked for.
    let target = resolve(&state, &id).await?;
    let lease = target.lease.as_ref().ok_or_else(|| Error::no_model(&id))?;
    Ok(HttpResponse::Ok().json(Model::from(ModelCard {
        id: id.clone(),
        root: lease.alias.clone(),
        parent: Some("student:base".into()),
        max_model_len: target.max_model_len()?,
        adapter_version: Some(lease.version),
        adapter_generation: Some(lease.adapter.generation.clone()),
        created,
    })))
}
