//! How processes find one another: all go to rank 0, which compares them and tells each where the others are.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::super::collectives::difference;
use super::super::group::Group;
use super::super::launch::Launch;
use super::super::threads::DEFAULT_TIMEOUT;
use super::super::transport;
use super::Tcp;
use crate::error::{Error, Result};
use crate::hash::fnv1a;

/// What all ranks must have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the program.
    pub code: String,
    /// Hash of everything that decides the run.
    pub recipe: String,
}

impl Identity {
    /// Of this program and the text of a recipe.
    pub fn new(recipe: &str) -> Self {
        let order = if cfg!(target_endian = "little") { "" } else { " (big-endian)" };
        Self {
            code: format!("{}{order}", env!("CARGO_PKG_VERSION")),
            recipe: format!("{:016x}", fnv1a(recipe.as_bytes())),
        }
    }
}

/// How long ranks wait for one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all to come.
    pub gather: Duration,
    /// For a message.
    pub silence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { gather: DEFAULT_TIMEOUT, silence: DEFAULT_TIMEOUT }
    }
}

/// Begins what a rank says first, so that others who knock at the port are told apart.
const MAGIC: &[u8; 8] = b"trencad\x01";
/// Most bytes of what is said before ranks are connected.
const LIMIT: u64 = 1 << 20;
/// How long one who knocks has to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// Between attempts to reach one who is not there yet.
const PAUSE: Duration = Duration::from_millis(20);

/// What a rank tells rank 0.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    rank: usize,
    size: usize,
    identity: Identity,
    /// Where it listens for other ranks.
    port: u16,
}

/// What rank 0 answers.
#[derive(Debug, Serialize, Deserialize)]
enum Verdict {
    Refused(String),
    /// A number that only these ranks know, and where each listens; no address where it is rank 0's machine.
    Welcome {
        token: u64,
        listeners: Vec<(Option<IpAddr>, u16)>,
    },
}

/// What a rank tells another that it reaches.
#[derive(Debug, Serialize, Deserialize)]
struct Dial {
    token: u64,
    rank: usize,
}

fn say(stream: &mut TcpStream, what: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(what)?;
    let mut message = MAGIC.to_vec();
    message.extend((text.len() as u64).to_le_bytes());
    message.extend(text);
    stream.write_all(&message)
}

fn hear<T: DeserializeOwned>(stream: &mut TcpStream) -> io::Result<T> {
    let (mut magic, mut len) = ([0; 8], [0; 8]);
    stream.read_exact(&mut magic)?;
    stream.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if magic != *MAGIC || len > LIMIT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = Vec::new();
    stream.take(len).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Connects the processes of a launch.
///
/// # Errors
/// Where a rank does not come, or ranks differ in version, recipe or number: on every rank with one message.
pub fn connect(launch: &Launch, identity: &Identity, timeouts: Timeouts) -> Result<Group> {
    let Launch { rank, world, address, port, .. } = launch;
    if *rank > 0 {
        return join((address, *port), *rank, *world, identity, timeouts);
    }
    // A machine's own name may lead to a loopback address on that machine, and not on others: so all networks are
    // listened to, unless the address says itself that there is one machine.
    let literal = address.parse::<IpAddr>().ok();
    let resolved = (address.as_str(), *port).to_socket_addrs().ok().and_then(|mut found| found.next());
    let ip = match literal.or_else(|| resolved.map(|found| found.ip())) {
        _ if *world == 1 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(ip) if ip.is_loopback() && (literal.is_some() || address == "localhost") => ip,
        Some(IpAddr::V6(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    // Alone it meets nobody, and any port will do.
    let port = if *world == 1 { 0 } else { *port };
    let listener = TcpListener::bind((ip, port)).map_err(|error| {
        Error::usage(format!("rank 0 cannot listen at {ip}:{port}: {error}; set MASTER_PORT to a free port"))
    })?;
    host(listener, *world, identity, timeouts)
}

/// Rank 0 of `size`, whom the others reach through `listener`.
///
/// # Errors
/// Those of [`connect`].
pub fn host(listener: TcpListener, size: usize, identity: &Identity, timeouts: Timeouts) -> Result<Group> {
    let deadline = transport::deadline(timeouts.gather);
    let mut came = gather(listener, size, deadline);
    came.sort_by_key(|(_, hello)| hello.rank);
    let refusal = contradiction(size, identity, &came).or_else(|| {
        let missing = (1..size).find(|rank| came.iter().all(|(_, hello)| hello.rank != *rank))?;
        Some(format!("rank {missing} of {size} has not come within {:?}; start all ranks", timeouts.gather))
    });
    let verdict = match refusal {
        Some(message) => Verdict::Refused(message),
        None => {
            let listeners = came.iter().map(|(stream, hello)| {
                let ip = stream.peer_addr().ok().map(|address| address.ip());
                (ip.filter(|ip| !ip.is_loopback()), hello.port)
            });
            // Rank 0 is reached already.
            let listeners = std::iter::once((None, 0)).chain(listeners).collect();
            Verdict::Welcome { token: RandomState::new().build_hasher().finish(), listeners }
        }
    };
    let mut streams = vec![None];
    for (mut stream, hello) in came {
        // One that has gone meanwhile is found out by its closed connection.
        let _ = say(&mut stream, &verdict);
        if let Verdict::Welcome { .. } = verdict {
            debug_assert_eq!(hello.rank, streams.len());
            streams.push(Some(stream));
        }
    }
    match verdict {
        Verdict::Refused(message) => Err(Error::usage(message)),
        Verdict::Welcome { .. } => Ok(Group::world(Arc::new(Tcp::new(0, streams, timeouts.silence)?))),
    }
}

/// All who say hello until `deadline`, or until there are `size` ranks. Each is heard on a thread of its own:
/// one who is silent keeps nobody waiting.
fn gather(listener: TcpListener, size: usize, deadline: Instant) -> Vec<(TcpStream, Hello)> {
    let (sender, heard) = channel();
    let mut came = Vec::new();
    // Where this fails, nobody comes, and that is what is reported.
    let _ = listener.set_nonblocking(true);
    while came.len() + 1 < size && Instant::now() < deadline {
        match listener.accept() {
            Ok((stream, _)) => greet(stream, sender.clone()),
            Err(_) => came.extend(heard.recv_timeout(PAUSE)),
        }
    }
    came
}

fn greet(mut stream: TcpStream, sender: Sender<(TcpStream, Hello)>) {
    std::thread::spawn(move || {
        let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(GREETING)));
        if let Ok(hello) = ready.and_then(|()| hear(&mut stream)) {
            // Too late: the gathering is over.
            let _ = sender.send((stream, hello));
        }
    });
}

/// What is wrong with those who came.
fn contradiction(size: usize, identity: &Identity, came: &[(TcpStream, Hello)]) -> Option<String> {
    let ranks: Vec<usize> = std::iter::once(0).chain(came.iter().map(|(_, hello)| hello.rank)).collect();
    let all = |mine: String, of: fn(&Hello) -> String| -> Vec<String> {
        std::iter::once(mine).chain(came.iter().map(|(_, hello)| of(hello))).collect()
    };
    difference("numbers of ranks", &ranks, &all(size.to_string(), |hello| hello.size.to_string()))
        .or_else(|| {
            let twice = ranks.windows(2).find(|pair| pair[0] == pair[1])?;
            Some(format!("rank {} has come twice; every process needs a rank of its own", twice[0]))
        })
        .or_else(|| {
            let beyond = ranks.iter().find(|&&rank| rank >= size)?;
            Some(format!("rank {beyond} has come, but there are {size} ranks, counted from 0"))
        })
        .or_else(|| {
            let codes = all(identity.code.clone(), |hello| hello.identity.code.clone());
            difference("versions of trencadis", &ranks, &codes)
        })
        .or_else(|| {
            let recipes = all(identity.recipe.clone(), |hello| hello.identity.recipe.clone());
            difference("recipes", &ranks, &recipes)
        })
}

/// Rank `rank`, not 0, of `size`; rank 0 is at `address`.
///
/// # Errors
/// Those of [`connect`].
pub fn join(
    (host, port): (&str, u16),
    rank: usize,
    size: usize,
    identity: &Identity,
    timeouts: Timeouts,
) -> Result<Group> {
    let timeout = timeouts.gather;
    let deadline = transport::deadline(timeout);
    let mut first =
        reach(|| (host, port).to_socket_addrs().map(Iterator::collect), deadline).map_err(|error| {
            Error::failure(format!(
                "rank 0 is not at {host}:{port} within {timeout:?}: {error}; start all ranks"
            ))
        })?;
    let lost = |error: io::Error| Error::failure(format!("rank 0 at {host}:{port} has gone: {error}"));
    let mine = first.local_addr().map_err(lost)?.ip();
    let theirs = first.peer_addr().map_err(lost)?.ip();
    let listener = TcpListener::bind((mine, 0))
        .map_err(|error| Error::failure(format!("rank {rank} cannot listen at {mine}: {error}")))?;
    let port = listener.local_addr().map_err(lost)?.port();
    say(&mut first, &Hello { rank, size, identity: identity.clone(), port }).map_err(lost)?;
    // Rank 0 may have begun to wait later than this one.
    first.set_read_timeout(Some(timeout.saturating_add(GREETING))).map_err(lost)?;
    let (token, listeners) = match hear(&mut first).map_err(lost)? {
        Verdict::Refused(message) => return Err(Error::usage(message)),
        Verdict::Welcome { token, listeners } => (token, listeners),
    };

    let mut streams: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
    streams[0] = Some(first);
    let deadline = transport::deadline(timeout);
    for (peer, (ip, port)) in listeners.iter().enumerate().take(rank).skip(1) {
        let address = SocketAddr::new(ip.unwrap_or(theirs), *port);
        let lost =
            |error: io::Error| Error::failure(format!("rank {peer} cannot be reached at {address}: {error}"));
        let mut stream = reach(|| Ok(vec![address]), deadline).map_err(lost)?;
        say(&mut stream, &Dial { token, rank }).map_err(lost)?;
        streams[peer] = Some(stream);
    }
    accept_later(&listener, rank, token, &mut streams, deadline)?;
    Ok(Group::world(Arc::new(Tcp::new(rank, streams, timeouts.silence)?)))
}

/// Connections of the ranks after this one.
fn accept_later(
    listener: &TcpListener,
    rank: usize,
    token: u64,
    streams: &mut [Option<TcpStream>],
    deadline: Instant,
) -> Result<()> {
    let failed = |error: io::Error| Error::failure(format!("rank {rank} cannot be connected: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    while let Some(missing) = (rank + 1..streams.len()).find(|&peer| streams[peer].is_none()) {
        if Instant::now() > deadline {
            return Err(Error::failure(format!("rank {missing} has not connected to rank {rank}")));
        }
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(PAUSE / 10);
            continue;
        };
        stream.set_nonblocking(false).map_err(failed)?;
        stream.set_read_timeout(Some(GREETING)).map_err(failed)?;
        match hear::<Dial>(&mut stream) {
            Ok(dial) if dial.token == token && (rank + 1..streams.len()).contains(&dial.rank) => {
                streams[dial.rank] = Some(stream);
            }
            // A stranger.
            _ => {}
        }
    }
    Ok(())
}

/// A connection to one of the addresses, which are looked up again and again until `deadline`.
fn reach(addresses: impl Fn() -> io::Result<Vec<SocketAddr>>, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        match addresses() {
            Ok(addresses) => {
                for address in addresses {
                    match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = error,
                    }
                }
            }
            Err(error) => last = error,
        }
        if Instant::now() >= deadline {
            return Err(last);
        }
        std::thread::sleep(PAUSE);
    }
}
