//! The routes, one file per resource.

mod adapters;
mod chat;
mod completions;
mod models;
mod page;
mod rdpo;
mod score;
mod status;
mod tokenize;

use actix_web::web::ServiceConfig;

pub(super) fn configure(app: &mut ServiceConfig) {
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
        resource(app);
    }
}
