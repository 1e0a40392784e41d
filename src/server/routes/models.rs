//! `GET /v1/models` and `/v1/models/{id}`.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use crate::error::Error;
use crate::roles::ModelCard;
use crate::server::AppState;
use crate::server::reply::{Reply, no_method};

pub(super) fn configure(app: &mut web::ServiceConfig) {
    app.service(web::resource("/v1/models").route(web::get().to(list)).default_service(web::route().to(no_method)));
    // Names may hold slashes.
    app.service(
        web::resource("/v1/models/{id:.+}").route(web::get().to(get)).default_service(web::route().to(no_method)),
    );
}

fn card(card: &ModelCard) -> Value {
    json!({
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "rdpo",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": card.max_model_len,
        "adapter_version": card.adapter_version,
        "adapter_generation": card.adapter_generation,
    })
}

async fn list(state: web::Data<AppState>) -> HttpResponse {
    let data: Vec<Value> = state.roles.list().iter().map(card).collect();
    HttpResponse::Ok().json(json!({"object": "list", "data": data}))
}

async fn get(state: web::Data<AppState>, id: web::Path<String>) -> Reply {
    let id = id.into_inner();
    if let Some(found) = state.roles.list().iter().find(|card| card.id == id) {
        return Ok(HttpResponse::Ok().json(card(found)));
    }
    // A pinned version is not in the list but can be asked for.
    let target = state.roles.resolve(&id)?;
    let lease = target.lease.as_ref().ok_or_else(|| Error::no_model(&id))?;
    Ok(HttpResponse::Ok().json(card(&ModelCard {
        id: id.clone(),
        root: lease.alias.clone(),
        parent: Some("student:base".into()),
        max_model_len: target.engine()?.max_model_len(),
        adapter_version: Some(lease.version),
        adapter_generation: Some(lease.adapter.generation.clone()),
        created: 0,
    })))
}
