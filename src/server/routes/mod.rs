//! The routes, one file per resource.

pub(super) mod adapters;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod models;
pub(super) mod page;
pub(super) mod rdpo;
pub(super) mod score;
pub(super) mod status;
pub(super) mod tokenize;

use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::web::ServiceConfig;
use actix_web::{App, FromRequest, Handler, HttpRequest, Responder, web};
use serde::Serialize;
use utoipa::ToSchema;

use super::reply::no_method;

/// Where the resources put their routes: gives them to the app and keeps a list of them.
pub(super) struct Routes<'a> {
    app: &'a mut ServiceConfig,
    listed: Vec<(&'static str, String)>,
}

impl Routes<'_> {
    fn get<F, Args>(&mut self, path: &str, handler: F)
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.listed.push(("get", path.to_owned()));
        let no_method = web::to(|request: HttpRequest| async move { no_method(&request, "GET") });
        self.app.service(web::resource(path).route(web::get().to(handler)).default_service(no_method));
    }

    fn post<F, Args>(&mut self, path: &str, handler: F)
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.listed.push(("post", path.to_owned()));
        let no_method = web::to(|request: HttpRequest| async move { no_method(&request, "POST") });
        self.app.service(web::resource(path).route(web::post().to(handler)).default_service(no_method));
    }

    fn get_and_post<G, GArgs, P, PArgs>(&mut self, path: &str, get: G, post: P)
    where
        G: Handler<GArgs>,
        GArgs: FromRequest + 'static,
        G::Output: Responder + 'static,
        P: Handler<PArgs>,
        PArgs: FromRequest + 'static,
        P::Output: Responder + 'static,
    {
        self.listed.extend([("get", path.to_owned()), ("post", path.to_owned())]);
        let no_method = web::to(|request: HttpRequest| async move { no_method(&request, "GET, POST") });
        let resource = web::resource(path).route(web::get().to(get)).route(web::post().to(post));
        self.app.service(resource.default_service(no_method));
    }
}

pub(super) fn configure(app: &mut ServiceConfig) {
    list(app);
}

fn list(app: &mut ServiceConfig) -> Vec<(&'static str, String)> {
    let mut routes = Routes { app, listed: Vec::new() };
    for resource in [
        adapters::configure,
        chat::configure,
        completions::configure,
        models::configure,
        page::configure,
        rdpo::configure,
        score::configure,
        tokenize::configure,
        status::configure,
    ] {
        resource(&mut routes);
    }
    routes.listed
}

/// Every route as method and path, the way OpenAPI writes them.
pub fn configured_routes() -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    let _ = App::new().configure(|app| found = list(app));
    found.into_iter().map(|(method, path)| (method, path.replace(":.+}", "}"))).collect()
}

/// A list as OpenAI writes one.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct List<T: ToSchema> {
    /// `list`.
    object: &'static str,
    /// The entries.
    data: Vec<T>,
}

impl<T: ToSchema> List<T> {
    fn new(data: Vec<T>) -> Self {
        List { object: "list", data }
    }
}

/// A part of a longer list.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct PageOf<T: ToSchema> {
    /// `list`.
    object: &'static str,
    /// The entries.
    data: Vec<T>,
    /// Whether more follow: ask again with `after`.
    has_more: bool,
}

impl<T: ToSchema> PageOf<T> {
    fn new(data: Vec<T>, has_more: bool) -> Self {
        PageOf { object: "list", data, has_more }
    }
}

/// Tokens spent.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct TokensUsed {
    /// Read.
    prompt_tokens: usize,
    /// Generated.
    completion_tokens: usize,
    /// Both.
    total_tokens: usize,
}

impl TokensUsed {
    fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        TokensUsed { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
