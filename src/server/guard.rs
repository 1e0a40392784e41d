//! Around every request: id, key, metrics, log line, and errors in the API's own form wherever they come from.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{
    ACCEPT_ENCODING, ALLOW, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue,
    ORIGIN, VARY, WWW_AUTHENTICATE,
};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Next;
use actix_web::{ResponseError, web};
use sha2::{Digest, Sha256};

use super::AppState;
use super::limits::InFlight;
use super::reply::ApiError;
use crate::error::{Code, Error};
use crate::telemetry::metrics;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What can be asked without a key; everything else needs one where the server has keys.
pub(super) const OPEN: [&str; 7] = ["/", "/health", "/ready", "/ping", "/version", "/metrics", "/openapi.yaml"];

pub(super) async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<Tracked>, actix_web::Error> {
    let mut flight = Flight::start(&request);
    let state = request.app_data::<web::Data<AppState>>().filter(|_| !OPEN.contains(&request.path()));
    flight.in_flight = state.map(|state| state.drain.enter());
    let given = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let id = given.or_else(|| HeaderValue::from_str(&format!("req-{}", uuid::Uuid::new_v4().simple())).ok());
    let admitted = authorize(&request).and_then(|()| state.map_or(Ok(()), |state| state.drain.check()));
    let bodiless = request.method() == Method::HEAD;
    let answered = match admitted {
        Ok(()) => next.call(request).await.map(ServiceResponse::map_into_boxed_body),
        Err(error) => Ok(request.into_response(ApiError(error).error_response())),
    };
    let mut response = match answered {
        // A stream would be made to its end for nobody; other bodies are counted for `content-length` and not sent.
        Ok(response) if bodiless && response.response().body().size() == BodySize::Stream => {
            response.map_body(|_, _| BoxBody::new(actix_web::body::None::new()))
        }
        Ok(response) => in_api_form(response),
        Err(error) => {
            flight.answered(error.error_response().status());
            flight.ended = true;
            return Err(error);
        }
    };
    flight.answered(response.status());
    // A stream has ended once its last piece was asked for; anything else is here already.
    flight.ended = response.response().body().size() != BodySize::Stream;
    // The mark that keeps a stream from being compressed is of no use to a client.
    if response.headers().get(CONTENT_ENCODING).is_some_and(|encoding| encoding == "identity") {
        response.headers_mut().remove(CONTENT_ENCODING);
    }
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    Ok(response.map_body(|_, body| Tracked { body, flight }))
}

/// Keys guard all that is not on the list. The path is compared as it was sent: a percent-encoded one that the router would
/// still understand is never on it.
fn authorize(request: &ServiceRequest) -> Result<(), Error> {
    let Some(state) = request.app_data::<web::Data<AppState>>() else { return Ok(()) };
    let keys = &state.limits.api_keys;
    if keys.is_empty() {
        return own_page(request.method(), request.headers());
    }
    if OPEN.contains(&request.path()) {
        return Ok(());
    }
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| Sha256::digest(key.trim().as_bytes()));
    // Digests are compared, and all of them, so that the time tells nothing about a key.
    let known = keys.iter().filter(|key| Some(Sha256::digest(key.as_bytes())) == given).count();
    if known > 0 {
        return Ok(());
    }
    let message = "Wrong or missing API key: send one of the server's `api_keys` as `Authorization: Bearer <key>`.";
    Err(Error::new(Code::InvalidApiKey, message))
}

/// An open server takes orders from programs and from its own page. Any other page that a browser in its network shows could
/// send it a form, without asking first; browsers say where a request comes from, and no page can change that.
fn own_page(method: &Method, headers: &HeaderMap) -> Result<(), Error> {
    if method.is_safe() {
        return Ok(());
    }
    let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    // The site is compared first: behind a proxy the host may be another than the page's.
    let own = match (text(&SEC_FETCH_SITE), text(&ORIGIN)) {
        (Some(site), _) => ["same-origin", "none"].contains(&site),
        (None, Some(origin)) => {
            let host = origin.split_once("://").map(|(_, host)| host);
            host.zip(text(&HOST)).is_some_and(|(page, host)| page.eq_ignore_ascii_case(host))
        }
        (None, None) => true,
    };
    if own {
        return Ok(());
    }
    let message = "This comes from the page of another site (`origin`, `sec-fetch-site`), which a server without `server.api_keys` \
                   takes nothing from: set keys, or ask through a program.";
    Err(Error::new(Code::Forbidden, message))
}

/// Errors that no handler made (a body too large, a path that is no text, an encoding nobody has) as the API words errors.
fn in_api_form(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let status = response.status();
    let is_json =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let why = response.response().error().map(ToString::to_string).filter(|text| !text.is_empty());
    let why = why.unwrap_or_else(|| status.canonical_reason().unwrap_or("the request failed").to_owned());
    let error = match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let most =
                response.request().app_data::<web::Data<AppState>>().map_or(0, |state| state.limits.max_body_bytes);
            Error::new(Code::TooLarge, format!("The body is larger than {most} bytes (`server.max_body_bytes`)."))
        }
        StatusCode::NOT_FOUND => Error::not_found(why),
        StatusCode::METHOD_NOT_ALLOWED => Error::new(Code::MethodNotAllowed, why),
        StatusCode::NOT_ACCEPTABLE => {
            Error::invalid(ACCEPT_ENCODING.as_str(), "`accept-encoding` refuses all this server has: gzip and identity")
        }
        status if status.is_client_error() => Error::new(Code::InvalidValue, why),
        _ => Error::internal(why),
    };
    let mut fresh = ApiError(error).error_response();
    *fresh.status_mut() = status;
    for name in [ALLOW, VARY, WWW_AUTHENTICATE] {
        if let Some(value) = response.headers().get(&name) {
            fresh.headers_mut().insert(name, value.clone());
        }
    }
    response.into_response(fresh)
}

/// A request from its arrival until its answer is written or its client is gone; what is left to count is counted when dropped.
struct Flight {
    endpoint: String,
    method: &'static str,
    started: Instant,
    answered: bool,
    ended: bool,
    /// Keeps a stopping server up.
    in_flight: Option<InFlight>,
}

impl Flight {
    fn start(request: &ServiceRequest) -> Self {
        metrics().http_requests_in_flight.inc();
        let endpoint = request.match_pattern().unwrap_or_else(|| "unmatched".into());
        let known =
            [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS, Method::PUT, Method::PATCH, Method::DELETE];
        let method = match known.iter().position(|method| method == request.method()) {
            // A client may send any word as a method; a label may not be any word.
            Some(at) => ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"][at],
            None => "other",
        };
        Flight { endpoint, method, started: Instant::now(), answered: false, ended: false, in_flight: None }
    }

    fn answered(&mut self, status: StatusCode) {
        self.answered = true;
        self.count(status.as_str());
        let seconds = self.started.elapsed().as_secs_f64();
        tracing::debug!(method = self.method, endpoint = self.endpoint, code = status.as_u16(), seconds, "answered");
    }

    fn count(&self, code: &str) {
        metrics().http_requests_total.with_label_values(&[self.endpoint.as_str(), self.method, code]).inc();
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        metrics().http_requests_in_flight.dec();
        if !self.ended {
            metrics().client_disconnects_total.inc();
        }
        if !self.answered {
            let (code, _, _) = Code::Cancelled.row();
            self.count(&code.to_string());
        }
        let seconds = self.started.elapsed().as_secs_f64();
        metrics().http_request_duration_seconds.with_label_values(&[&self.endpoint]).observe(seconds);
    }
}

/// A body that carries its [`Flight`].
pub(super) struct Tracked {
    body: BoxBody,
    flight: Flight,
}

impl MessageBody for Tracked {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<web::Bytes, Self::Error>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_next(context);
        if let Poll::Ready(None) = &polled {
            this.flight.ended = true;
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn an_open_server_takes_orders_from_its_own_page_only() {
        let taken = |method: Method, sent: &[(&str, &str)]| {
            let request = sent.iter().fold(TestRequest::default(), |request, header| request.insert_header(*header));
            own_page(&method, request.to_http_request().headers()).is_ok()
        };
        let local = ("host", "127.0.0.1:8080");
        for sent in [
            &[local][..],
            &[local, ("origin", "http://127.0.0.1:8080")],
            &[("host", "localhost:8080"), ("origin", "http://LocalHost:8080"), ("sec-fetch-site", "same-origin")],
            &[("host", "rdpo.example"), ("origin", "https://rdpo.example")],
            &[local, ("origin", "https://rdpo.example"), ("sec-fetch-site", "same-origin")],
            &[local, ("sec-fetch-site", "none")],
        ] {
            assert!(taken(Method::POST, sent), "{sent:?}");
        }
        for sent in [
            &[local, ("origin", "https://evil.example")][..],
            &[local, ("origin", "http://127.0.0.1:3000")],
            &[local, ("origin", "http://localhost:8080")],
            &[local, ("origin", "null")],
            &[("origin", "http://127.0.0.1:8080")],
            &[local, ("sec-fetch-site", "cross-site")],
            &[local, ("origin", "http://127.0.0.1:3000"), ("sec-fetch-site", "same-site")],
        ] {
            for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                assert!(!taken(method, sent), "{sent:?}");
            }
            for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
                assert!(taken(method, sent), "{sent:?}");
            }
        }
    }
}
