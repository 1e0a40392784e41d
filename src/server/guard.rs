//! Around every request: id, key, metrics, log line.

use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{AUTHORIZATION, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{ResponseError, web};
use sha2::{Digest, Sha256};

use super::AppState;
use super::reply::ApiError;
use crate::error::{Code, Error};
use crate::telemetry::metrics;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub(super) async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let started = Instant::now();
    let given = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let id = given.or_else(|| HeaderValue::from_str(&format!("req-{}", uuid::Uuid::new_v4().simple())).ok());
    let method = request.method().to_string();
    metrics().http_requests_in_flight.inc();
    let allowed = authorize(&request);
    let answered = match allowed {
        Ok(()) => next.call(request).await.map(ServiceResponse::map_into_left_body),
        Err(error) => {
            let response = ApiError(error).error_response();
            Ok(request.into_response(response).map_into_right_body())
        }
    };
    metrics().http_requests_in_flight.dec();
    let mut response = match answered {
        Ok(response) => response,
        Err(error) => return Err(error),
    };
    let endpoint = response.request().match_pattern().unwrap_or_else(|| "unmatched".into());
    let code = response.status().as_u16().to_string();
    metrics().http_requests_total.with_label_values(&[endpoint.as_str(), &method, &code]).inc();
    metrics().http_request_duration_seconds.with_label_values(&[&endpoint]).observe(started.elapsed().as_secs_f64());
    tracing::debug!(
        method,
        path = response.request().path(),
        code,
        seconds = started.elapsed().as_secs_f64(),
        "answered"
    );
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    Ok(response)
}

/// Keys guard `/v1` and the token routes; health and metrics stay open.
fn authorize(request: &ServiceRequest) -> Result<(), Error> {
    let Some(state) = request.app_data::<web::Data<AppState>>() else { return Ok(()) };
    let keys = &state.limits.api_keys;
    let guarded = ["/v1", "/tokenize", "/detokenize"].iter().any(|prefix| request.path().starts_with(prefix));
    if keys.is_empty() || !guarded {
        return Ok(());
    }
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).map(|key| Sha256::digest(key.as_bytes()));
    // Digests are compared, and all of them, so that the time tells nothing about a key.
    let known = keys.iter().filter(|key| Some(Sha256::digest(key.as_bytes())) == given).count();
    if known > 0 {
        return Ok(());
    }
    let message = "Wrong or missing API key: send one of the server's `api_keys` as `Authorization: Bearer <key>`.";
    Err(Error::new(Code::InvalidApiKey, message))
}
