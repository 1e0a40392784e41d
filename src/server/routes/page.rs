//! `GET /`: the page that shows what the server does, over the same API everybody else uses.

use actix_web::HttpResponse;
use actix_web::http::header::CONTENT_SECURITY_POLICY;

use super::Routes;

const PAGE: &str = include_str!("../ui/index.html");
/// The page brings all it needs; nothing is fetched from elsewhere.
const POLICY: &str = "default-src 'none'; connect-src 'self'; img-src data:; \
                      style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'";

pub(super) fn configure(routes: &mut Routes<'_>) {
    routes.get("/", page);
}

async fn page() -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .body(PAGE)
}
