//! Adapters: load and unload as vLLM names them, list, publish with compare-and-swap, roll back.

use std::collections::BTreeMap;

use actix_web::{HttpResponse, web};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Routes;
use crate::error::{Error, Result};
use crate::roles::{AdapterCard, Lease, PublishMode};
use crate::server::AppState;
use crate::server::reply::{Reply, blocking, parse};

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.post("/v1/load_lora_adapter", load);
    routes.post("/v1/unload_lora_adapter", unload);
    routes.get("/v1/lora_adapters", list);
    routes.post("/v1/lora_adapters/{alias}/publish", publish);
    routes.post("/v1/lora_adapters/{alias}/rollback", rollback);
}

/// Body of `/v1/load_lora_adapter`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadRequest {
    /// Name it is asked for by.
    pub(crate) lora_name: String,
    /// Folder under the adapter root.
    pub(crate) lora_path: String,
    /// Replace what has the name.
    #[serde(default, alias = "replace")]
    pub(crate) load_inplace: bool,
    /// Replace it only if this generation is live.
    #[serde(default)]
    pub(crate) expected_generation: Option<String>,
    /// The role it is for; only `student` takes adapters.
    #[serde(default)]
    pub(crate) model: Option<String>,
    /// vLLM's; only `false` is known here.
    #[serde(default)]
    pub(crate) is_3d_lora_weight: bool,
}

/// Body of `/v1/unload_lora_adapter`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadRequest {
    /// Name.
    pub(crate) lora_name: String,
    /// Only if this generation is live.
    #[serde(default)]
    pub(crate) expected_generation: Option<String>,
    /// vLLM's number of the adapter; names are enough here, so it is not read.
    #[serde(default)]
    #[expect(dead_code, reason = "taken so that vLLM's clients are not refused")]
    pub(crate) lora_int_id: Option<i64>,
}

/// Body of `/v1/lora_adapters/{alias}/publish`: a folder or a version.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PublishRequest {
    /// Folder under the adapter root.
    pub(crate) path: Option<String>,
    /// Or a version of the alias, published once more.
    pub(crate) version: Option<u64>,
    /// Only if this generation is live.
    pub(crate) expected_generation: Option<String>,
}

/// Body of `/v1/lora_adapters/{alias}/rollback`; may be empty.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RollbackRequest {
    /// Version to make live; the one before the live one where it is left out.
    pub(crate) version: Option<u64>,
}

impl LoadRequest {
    fn mode(&self) -> Result<PublishMode> {
        named("lora_name", &self.lora_name)?;
        named("lora_path", &self.lora_path)?;
        if self.is_3d_lora_weight {
            return Err(Error::invalid("is_3d_lora_weight", "adapters of fused expert weights are not known here"));
        }
        if let Some(model) = self.model.as_deref().filter(|model| *model != "student") {
            return Err(Error::invalid("model", format!("`{model}` takes no adapters; `student` does")));
        }
        Ok(match &self.expected_generation {
            Some(expected) => PublishMode::CompareAndSwap(expected.clone()),
            None if self.load_inplace => PublishMode::Upsert,
            None => PublishMode::Create,
        })
    }
}

fn named(field: &str, value: &str) -> Result<()> {
    if value.trim().is_empty() { Err(Error::invalid(field, "must not be empty")) } else { Ok(()) }
}

/// A version of an adapter.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct AdapterVersion {
    /// Model name to ask for: the alias where it is live, `alias@version` otherwise.
    id: String,
    /// `lora_adapter`.
    object: &'static str,
    /// The alias.
    alias: String,
    /// Number under the alias.
    version: u64,
    /// Content hash.
    generation: String,
    /// Rank.
    rank: usize,
    /// Bytes in memory; 0 while it is only on disk.
    bytes: usize,
    /// Whether it answers under the alias.
    live: bool,
    /// Requests that hold it.
    active_leases: usize,
    /// Folder with its PEFT files.
    source: String,
    /// What speaks against it, though it fits: it says it was made for another model. Only in the answer to a change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    warning: Option<String>,
}

/// Versions with the same content.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Generation {
    /// Content hash.
    generation: String,
    /// No alias has it live.
    retired: bool,
    /// Aliases that have it live.
    aliases: Vec<String>,
    /// Rank.
    rank: usize,
    /// Bytes in memory.
    bytes: usize,
    /// Requests that hold it.
    active_leases: usize,
}

/// All adapters and what room they take.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct AdapterList {
    /// `list`.
    object: &'static str,
    /// Every version of every alias.
    data: Vec<AdapterVersion>,
    /// The same by content.
    generations: Vec<Generation>,
    /// Generations in memory.
    resident_generations: usize,
    /// Generations that are live nowhere.
    retired_generations: usize,
    /// Bytes in memory.
    resident_bytes: usize,
    /// Most versions kept in memory besides those in use.
    max_adapters: usize,
    /// Largest rank taken.
    max_rank: usize,
}

impl From<&AdapterCard> for AdapterVersion {
    fn from(card: &AdapterCard) -> Self {
        AdapterVersion {
            id: if card.live { card.alias.clone() } else { format!("{}@{}", card.alias, card.version) },
            object: "lora_adapter",
            alias: card.alias.clone(),
            version: card.version,
            generation: card.generation.clone(),
            rank: card.rank,
            bytes: card.bytes,
            live: card.live,
            active_leases: card.active_leases,
            source: card.source.display().to_string(),
            warning: None,
        }
    }
}

/// What is live after a change.
fn live(state: &AppState, lease: &Lease) -> Result<HttpResponse> {
    let cards = state.roles.adapters().list();
    let found = cards.iter().find(|card| card.alias == lease.alias && card.version == lease.version);
    let version = AdapterVersion::from(found.ok_or_else(|| Error::no_model(&lease.alias))?);
    Ok(HttpResponse::Ok().json(AdapterVersion { warning: doubt(state, lease), ..version }))
}

/// What speaks against an adapter, for the reply; the log has it too.
fn doubt(state: &AppState, lease: &Lease) -> Option<String> {
    let doubt = state.roles.doubt(&lease.adapter)?;
    tracing::warn!(adapter = lease.alias, version = lease.version, "{doubt}");
    Some(doubt)
}

async fn list(state: web::Data<AppState>) -> Reply {
    let cards = state.roles.adapters().list();
    let (max_adapters, max_rank) = state.roles.adapters().limits();
    let mut generations: BTreeMap<&str, Vec<&AdapterCard>> = BTreeMap::new();
    for one in &cards {
        generations.entry(&one.generation).or_default().push(one);
    }
    let generations: Vec<Generation> = generations
        .iter()
        .map(|(generation, of)| {
            let aliases: Vec<String> = of.iter().filter(|one| one.live).map(|one| one.alias.clone()).collect();
            Generation {
                generation: (*generation).to_owned(),
                retired: aliases.is_empty(),
                aliases,
                rank: of.first().map_or(0, |one| one.rank),
                bytes: of.iter().map(|one| one.bytes).sum(),
                active_leases: of.iter().map(|one| one.active_leases).sum(),
            }
        })
        .collect();
    Ok(HttpResponse::Ok().json(AdapterList {
        object: "list",
        data: cards.iter().map(AdapterVersion::from).collect(),
        resident_generations: generations.iter().filter(|one| one.bytes > 0).count(),
        retired_generations: generations.iter().filter(|one| one.retired).count(),
        resident_bytes: cards.iter().map(|one| one.bytes).sum(),
        generations,
        max_adapters,
        max_rank,
    }))
}

async fn load(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: LoadRequest = parse(&body)?;
    let mode = request.mode()?;
    let (roles, name) = (state.roles.clone(), request.lora_name.clone());
    let lease = blocking(move || roles.adapters().load(&request.lora_name, &request.lora_path, mode)).await?;
    Ok(success(&name, "added", doubt(&state, &lease)))
}

async fn unload(state: web::Data<AppState>, body: web::Bytes) -> Reply {
    let request: UnloadRequest = parse(&body)?;
    named("lora_name", &request.lora_name)?;
    let (roles, name) = (state.roles.clone(), request.lora_name.clone());
    blocking(move || roles.adapters().unload(&request.lora_name, request.expected_generation.as_deref())).await?;
    Ok(success(&name, "removed", None))
}

/// The text that vLLM sends, and a warning where there is one.
fn success(name: &str, what: &str, warning: Option<String>) -> HttpResponse {
    let warning = warning.map_or_else(String::new, |warning| format!(" Warning: {warning}."));
    let text = format!("Success: LoRA adapter '{name}' {what} successfully.{warning}");
    HttpResponse::Ok().content_type("text/plain; charset=utf-8").body(text)
}

async fn publish(state: web::Data<AppState>, alias: web::Path<String>, body: web::Bytes) -> Reply {
    let (alias, request) = (alias.into_inner(), parse::<PublishRequest>(&body)?);
    let mode = request.expected_generation.clone().map_or(PublishMode::Upsert, PublishMode::CompareAndSwap);
    let roles = state.roles.clone();
    let lease = blocking(move || {
        let adapters = roles.adapters();
        match (&request.path, request.version) {
            (Some(path), None) => adapters.load(&alias, path, mode).map_err(|error| match error.param.as_deref() {
                Some("lora_path") => error.at("path"),
                _ => error,
            }),
            (None, Some(version)) => {
                let name = format!("{alias}@{version}");
                if !adapters.list().iter().any(|card| card.alias == alias && card.version == version) {
                    return Err(Error::no_model(&name).at("version"));
                }
                adapters.publish(&alias, &adapters.file(&name)?, mode)
            }
            _ => Err(Error::invalid("path", "give either `path` or `version`")),
        }
    })
    .await?;
    Ok(live(&state, &lease)?)
}

async fn rollback(state: web::Data<AppState>, alias: web::Path<String>, body: web::Bytes) -> Reply {
    let request: RollbackRequest = if body.is_empty() { RollbackRequest::default() } else { parse(&body)? };
    let roles = state.roles.clone();
    let lease = blocking(move || roles.adapters().rollback(&alias, request.version)).await?;
    Ok(live(&state, &lease)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(body: Value) -> Result<PublishMode> {
        parse::<LoadRequest>(&web::Bytes::from(body.to_string()))?.mode()
    }

    #[test]
    fn how_a_load_treats_the_alias() {
        assert_eq!(read(json!({"lora_name": "a", "lora_path": "x"})).unwrap(), PublishMode::Create);
        let replace = json!({"lora_name": "a", "lora_path": "x", "replace": true});
        assert_eq!(read(replace).unwrap(), PublishMode::Upsert);
        let swap = json!({"lora_name": "a", "lora_path": "x", "expected_generation": "g", "load_inplace": true});
        assert_eq!(read(swap).unwrap(), PublishMode::CompareAndSwap("g".into()));
    }

    #[test]
    fn errors_name_the_field() {
        let param = |body: Value| read(body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"lora_name": " ", "lora_path": "x"})), "lora_name");
        assert_eq!(param(json!({"lora_name": "a", "lora_path": ""})), "lora_path");
        assert_eq!(param(json!({"lora_name": "a", "lora_path": "x", "model": "teacher"})), "model");
        assert_eq!(param(json!({"lora_name": "a", "lora_path": "x", "is_3d_lora_weight": true})), "is_3d_lora_weight");
        assert_eq!(param(json!({"lora_name": "a", "lora_path": "x", "path": "y"})), "path");
    }
}
