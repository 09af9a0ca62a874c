// Closed-loop HTTP/1.1 load over keep-alive connections, one epoll thread; prints one line of JSON.
//
//   load PORT PATH BODY_FILE CONNECTIONS SECONDS WARM_UP_SECONDS RATE [HEADER: VALUE]...
//
// RATE limits the requests a second of all connections together; 0 is as fast as answers come. An answer counts when
// it is whole, its status is 200 and its body reports usage. Times are in milliseconds: `first` is that of the first
// request of each connection, `ttfb` the time until the first byte of the body.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 512, READ_ROOM = 1 << 16, FIRST_ROOM = 1 << 17, LONGEST_BODY = 1 << 22, HEAD_ROOM = 1 << 14 };

typedef struct {
  int fd;
  int is_idle;        // waits for its turn, when the rate is limited
  int has_answered;   // its first request is over
  double started, first_byte;
  size_t sent;        // bytes of the request
  char *data;         // the answer so far
  size_t length, capacity, head_length, chunk_at;
  long body_length;   // -1: not said
  int is_chunked;
} connection;

typedef struct {
  float *values;
  size_t count, capacity;
} series;

static int poller, port;
static char *request;
static size_t request_length;
static double counts_from, ends_at;
static long right_answers, all_right_answers, wrong_answers, reconnects;
static series totals, first_bytes, firsts;
static char complaint[400];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void append(series *s, double value) {
  if (s->count == s->capacity) {
    s->capacity = s->capacity ? s->capacity * 2 : 1 << 16;
    s->values = realloc(s->values, s->capacity * sizeof *s->values);
  }
  s->values[s->count++] = (float)value;
}

static int ascending(const void *left, const void *right) {
  float a = *(const float *)left, b = *(const float *)right;
  return (a > b) - (a < b);
}

static double quantile(series *s, double q) {
  qsort(s->values, s->count, sizeof *s->values, ascending);
  return s->count ? s->values[(size_t)((double)(s->count - 1) * q)] : 0;
}

// Sends what the socket takes of the request, and asks to be told when it takes more.
static void push(connection *c) {
  while (c->sent < request_length) {
    ssize_t wrote = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (wrote <= 0) break;
    c->sent += (size_t)wrote;
  }
}

static void watch(connection *c, int operation) {
  struct epoll_event event = {.events = EPOLLIN | (c->sent < request_length ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, operation, c->fd, &event);
}

static void ask(connection *c) {
  c->is_idle = 0;
  c->started = now();
  c->first_byte = 0;
  c->length = c->head_length = c->chunk_at = c->sent = 0;
  c->body_length = -1;
  c->is_chunked = 0;
  push(c);
  if (c->sent < request_length) watch(c, EPOLL_CTL_MOD);
}

static void connect_to_server(connection *c) {
  int yes = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
    perror("connect");
    exit(1);
  }
  c->sent = request_length;
  watch(c, EPOLL_CTL_ADD);
}

static int says_ok(const connection *c) {
  if (c->length < 13 || memcmp(c->data + 9, "200", 3)) return 0;
  return memmem(c->data, c->length, "completion_tokens", 17) || memmem(c->data, c->length, "output_tokens", 13);
}

// Counts the answer that has ended; `is_whole` is 0 when the connection ended in it.
static void count(connection *c, int is_whole) {
  double t = now();
  int is_right = is_whole && says_ok(c);
  if (is_right && !c->has_answered) append(&firsts, (t - c->started) * 1e3);
  c->has_answered = 1;
  all_right_answers += is_right;
  if (t > ends_at) return;
  if (!is_right) {
    wrong_answers++;
    if (!complaint[0] && c->length)
      snprintf(complaint, sizeof complaint, "%.*s", (int)(c->length < 380 ? c->length : 380), c->data);
  } else if (t >= counts_from) {
    right_answers++;
    append(&totals, (t - c->started) * 1e3);
    append(&first_bytes, (c->first_byte - c->started) * 1e3);
  }
}

static void read_head(connection *c) {
  char *end = memmem(c->data, c->length, "\r\n\r\n", 4);
  if (!end) return;
  c->head_length = c->chunk_at = (size_t)(end - c->data) + 4;
  *end = 0;
  char *length = strcasestr(c->data, "\r\ncontent-length:");
  if (length) c->body_length = strtol(length + 17, 0, 10);
  c->is_chunked = strcasestr(c->data, "\r\ntransfer-encoding:") != 0;
  *end = '\r';
}

static int is_complete(connection *c) {
  if (!c->head_length) read_head(c);
  if (!c->head_length) return 0;
  if (!c->first_byte && c->length > c->head_length) c->first_byte = now();
  if (!c->is_chunked) return c->body_length >= 0 && c->length >= c->head_length + (size_t)c->body_length;
  for (;;) {
    char *line_end = memmem(c->data + c->chunk_at, c->length - c->chunk_at, "\r\n", 2);
    if (!line_end) return 0;
    long size = strtol(c->data + c->chunk_at, 0, 16);
    size_t end = (size_t)(line_end - c->data) + 2 + (size_t)size + 2;
    if (end > c->length) return 0;
    c->chunk_at = end;
    if (!size) return 1;
  }
}

static int will_close(connection *c) {
  char *end = c->data + c->head_length - 4;
  *end = 0;
  int closes = strcasestr(c->data, "\r\nconnection: close") != 0;
  *end = '\r';
  return closes;
}

static void reconnect(connection *c) {
  close(c->fd);
  reconnects++;
  connect_to_server(c);
}

// Reads what has come; 1 when the connection may ask again.
static int receive(connection *c) {
  if (c->capacity - c->length < READ_ROOM) {
    c->capacity *= 2;
    c->data = realloc(c->data, c->capacity);
  }
  ssize_t got = recv(c->fd, c->data + c->length, c->capacity - c->length, MSG_DONTWAIT);
  if (got < 0 && errno == EAGAIN) return 0;
  if (got <= 0) {
    // A server may close a connection that rests; within an answer, only if that has no other end.
    if (c->length && !c->is_idle) count(c, c->head_length && !c->is_chunked && c->body_length < 0);
    reconnect(c);
    return 1;
  }
  c->length += (size_t)got;
  if (c->is_idle || !is_complete(c)) return 0;
  count(c, 1);
  if (will_close(c)) reconnect(c);
  return 1;
}

static void read_request(const char *path, const char *body_file, char **headers, int header_count) {
  FILE *file = fopen(body_file, "r");
  if (!file) {
    perror(body_file);
    exit(1);
  }
  char *body = malloc(LONGEST_BODY);
  size_t body_length = fread(body, 1, LONGEST_BODY, file);
  fclose(file);
  request = malloc(body_length + HEAD_ROOM);
  size_t n = (size_t)snprintf(request, HEAD_ROOM,
                              "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                              "Accept: */*\r\nUser-Agent: bench\r\n",
                              path, port);
  for (int i = 0; i < header_count && n < HEAD_ROOM; i++)
    n += (size_t)snprintf(request + n, HEAD_ROOM - n, "%s\r\n", headers[i]);
  if (n < HEAD_ROOM) n += (size_t)snprintf(request + n, HEAD_ROOM - n, "Content-Length: %zu\r\n\r\n", body_length);
  if (n >= HEAD_ROOM) {
    fprintf(stderr, "the headers are too long\n");
    exit(1);
  }
  memcpy(request + n, body, body_length);
  request_length = n + body_length;
  free(body);
}

static double cpu_s(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

// Lets idle connections ask, as far as the rate allows by now.
static void release(connection *connections, int how_many, double rate, double began, long *asked) {
  long due = (long)((now() - began) * rate) - *asked;
  for (int i = 0; i < how_many && due > 0; i++) {
    if (!connections[i].is_idle) continue;
    ask(&connections[i]);
    (*asked)++;
    due--;
  }
}

int main(int argc, char **argv) {
  if (argc < 8) {
    fprintf(stderr, "load PORT PATH BODY_FILE CONNECTIONS SECONDS WARM_UP_SECONDS RATE [HEADER: VALUE]...\n");
    return 2;
  }
  port = atoi(argv[1]);
  int how_many = atoi(argv[4]);
  double seconds = atof(argv[5]), warm_up_seconds = atof(argv[6]), rate = atof(argv[7]);
  read_request(argv[2], argv[3], argv + 8, argc - 8);
  poller = epoll_create1(0);
  connection *connections = calloc((size_t)how_many, sizeof *connections);
  for (int i = 0; i < how_many; i++) {
    connections[i].capacity = FIRST_ROOM;
    connections[i].data = malloc(FIRST_ROOM);
    connect_to_server(&connections[i]);
  }
  double began = now(), cpu_before_s = cpu_s();
  long asked = 0;
  counts_from = began + warm_up_seconds;
  ends_at = counts_from + seconds;
  for (int i = 0; i < how_many; i++) {
    if (rate > 0) connections[i].is_idle = 1;
    else ask(&connections[i]);
  }
  struct epoll_event events[EVENTS];
  while (now() < ends_at) {
    if (rate > 0) release(connections, how_many, rate, began, &asked);
    int ready = epoll_wait(poller, events, EVENTS, rate > 0 ? 1 : 50);
    for (int i = 0; i < ready; i++) {
      connection *c = events[i].data.ptr;
      if (events[i].events & EPOLLOUT) {
        push(c);
        watch(c, EPOLL_CTL_MOD);
      }
      if (!(events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || !receive(c)) continue;
      if (rate > 0) c->is_idle = 1;
      else ask(c);
    }
  }
  double cpu = (cpu_s() - cpu_before_s) / (seconds + warm_up_seconds);
  for (char *p = complaint; *p; p++)
    if (*p < 32 || *p == '"' || *p == '\\' || *p > 126) *p = ' ';
  printf("{\"per_s\":%.1f,\"right\":%ld,\"all_right\":%ld,\"wrong\":%ld,\"reconnects\":%ld,",
         (double)right_answers / seconds, right_answers, all_right_answers, wrong_answers, reconnects);
  printf("\"p50_ms\":%.3f,\"p99_ms\":%.3f,", quantile(&totals, .5), quantile(&totals, .99));
  printf("\"ttfb_p50_ms\":%.3f,\"ttfb_p99_ms\":%.3f,\"first_p50_ms\":%.3f,\"first_p99_ms\":%.3f,",
         quantile(&first_bytes, .5), quantile(&first_bytes, .99), quantile(&firsts, .5), quantile(&firsts, .99));
  printf("\"load_cores\":%.3f,\"complaint\":\"%s\"}\n", cpu, complaint);
  return 0;
}
