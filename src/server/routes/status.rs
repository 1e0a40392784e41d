//! Health, readiness, version, metrics, the API's own description.

use actix_web::{HttpResponse, web};
use prometheus::{Encoder, TextEncoder};
use serde_json::json;

use crate::error::Error;
use crate::server::reply::Reply;
use crate::telemetry::metrics;

/// The API's description, checked against the code by a test.
const OPENAPI: &str = include_str!("../../../openapi.yaml");

pub(super) fn configure(app: &mut web::ServiceConfig) {
    // The port only answers once every role is loaded, so health and readiness are the same.
    app.route("/health", web::get().to(HttpResponse::Ok));
    app.route("/ready", web::get().to(HttpResponse::Ok));
    app.route("/ping", web::get().to(HttpResponse::Ok));
    app.route(
        "/version",
        web::get().to(|| async { HttpResponse::Ok().json(json!({"version": env!("CARGO_PKG_VERSION")})) }),
    );
    app.route("/metrics", web::get().to(exposition));
    app.route(
        "/openapi.yaml",
        web::get().to(|| async { HttpResponse::Ok().content_type("application/yaml").body(OPENAPI) }),
    );
}

async fn exposition() -> Reply {
    let mut text = Vec::new();
    let mut families = metrics().registry.gather();
    families.extend(prometheus::gather());
    TextEncoder::new().encode(&families, &mut text).map_err(|error| Error::internal(error.to_string()))?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text))
}
