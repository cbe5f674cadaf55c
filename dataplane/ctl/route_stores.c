/* The kernel's links, addresses, routes and neighbours, as netlink tells them. Only the control thread is
 * here. See route.c for what becomes of them.
 */
#include <arpa/inet.h>
#include <linux/if_link.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "route_internal.h"

/* ---- the stores ---- */

void *route_grown(void *array, uint32_t n, size_t item_bytes)
{
	/* to the next power of two: callers grow one by one */
	if (n & (n - 1))
		return array;
	void *more = realloc(array, (n ? (size_t)n * 2 : 1) * item_bytes);
	if (!more)
		abort(); /* a gateway that cannot learn routes must be restarted, not go on half blind */
	return more;
}

struct link *route_link_find(const struct route *r, int ifindex)
{
	for (uint32_t i = 0; i < r->n_links; i++)
		if (r->links[i].ifindex == ifindex)
			return &r->links[i];
	return NULL;
}

uint8_t route_iface_of(const struct route *r, int ifindex)
{
	const struct link *link = route_link_find(r, ifindex);

	return link ? link->iface : NO_IFACE;
}

static uint32_t chain_of(const struct route *r, uint32_t prefix, uint8_t length_bits)
{
	return ((prefix ^ length_bits) * 2654435761u >> 8) & (r->n_chains - 1);
}

static struct entry **entry_find(const struct route *r, const struct entry *like)
{
	struct entry **at = &r->chains[chain_of(r, like->prefix, like->length_bits)];

	while (*at &&
	       ((*at)->prefix != like->prefix || (*at)->length_bits != like->length_bits ||
		(*at)->rank != like->rank || (*at)->priority != like->priority || (*at)->tos != like->tos))
		at = &(*at)->next;
	return at;
}

void route_chains_grow(struct route *r)
{
	struct entry **old = r->chains;
	uint32_t n = r->n_chains;

	r->n_chains = n ? n * 2 : 256;
	r->chains = calloc(r->n_chains, sizeof *r->chains);
	if (!r->chains)
		abort();
	for (uint32_t i = 0; i < n; i++)
		for (struct entry *e = old[i], *next; e; e = next) {
			struct entry **at = &r->chains[chain_of(r, e->prefix, e->length_bits)];

			next = e->next;
			e->next = *at;
			*at = e;
		}
	free(old);
}

void route_stores_clear(struct route *r)
{
	for (uint32_t i = 0; i < r->n_chains; i++)
		for (struct entry *e = r->chains[i], *next; e; e = next) {
			next = e->next;
			free(e);
		}
	if (r->chains)
		memset(r->chains, 0, r->n_chains * sizeof *r->chains);
	r->n_routes = r->n_addresses = r->n_links = 0;
}

/* ---- netlink: reading ---- */

struct attributes {
	const struct nlattr *at[RTA_MAX > IFLA_MAX ? RTA_MAX + 1 : IFLA_MAX + 1];
	uint16_t max;
};

static int attribute_note(const struct nlattr *attr, void *data)
{
	struct attributes *a = data;

	if (mnl_attr_get_type(attr) <= a->max)
		a->at[mnl_attr_get_type(attr)] = attr;
	return MNL_CB_OK;
}

static struct attributes attributes_of(const struct nlmsghdr *message, size_t header_bytes, uint16_t max)
{
	struct attributes a = {.max = max};

	mnl_attr_parse(message, (unsigned)header_bytes, attribute_note, &a);
	return a;
}

static uint32_t u32_of(const struct nlattr *attr)
{
	return attr && mnl_attr_get_payload_len(attr) >= 4 ? mnl_attr_get_u32(attr) : 0;
}

static void on_link(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ifinfomsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, IFLA_MAX);
	struct link *link = route_link_find(r, info->ifi_index),
		    fresh = {.ifindex = info->ifi_index, .iface = NO_IFACE};

	if (info->ifi_family != AF_UNSPEC) /* a bridge speaks of its ports: nothing of ours */
		return;
	if (gone) {
		if (link) {
			*link = r->links[--r->n_links];
			r->must_dump = true;
		}
		return;
	}
	if (!a.at[IFLA_IFNAME])
		return;
	snprintf(fresh.name, sizeof fresh.name, "%s", mnl_attr_get_str(a.at[IFLA_IFNAME]));
	fresh.flags = info->ifi_flags;
	fresh.mtu_bytes = u32_of(a.at[IFLA_MTU]);
	for (uint32_t i = 0; i < r->params.n_interfaces; i++)
		if (!strcmp(r->params.interfaces[i].name, fresh.name))
			fresh.iface = (uint8_t)i;
	if (!link) {
		r->links = route_grown(r->links, r->n_links, sizeof *r->links);
		link = &r->links[r->n_links++];
		if (fresh.iface != NO_IFACE &&
		    !r->dumping) /* it may have addresses that came before its name */
			r->must_dump = true;
	} else if (strcmp(link->name, fresh.name) || (link->flags & IFF_UP && !(fresh.flags & IFF_UP))) {
		r->must_dump = true;
	} else if (link->flags == fresh.flags && link->mtu_bytes == fresh.mtu_bytes) {
		return; /* statistics, wireless events */
	}
	*link = fresh;
	r->dirty = true;
}

static void on_address(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ifaddrmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, IFA_MAX);

	if (info->ifa_family != AF_INET || !a.at[IFA_LOCAL])
		return;
	uint32_t local_be = u32_of(a.at[IFA_LOCAL]);
	uint32_t peer_be = a.at[IFA_ADDRESS] ? u32_of(a.at[IFA_ADDRESS]) : local_be;
	struct address fresh = {
		.ifindex = (int)info->ifa_index,
		.local_be = local_be,
		.prefix = ntohl(peer_be) & route_mask(info->ifa_prefixlen),
		.length_bits = info->ifa_prefixlen,
	};

	r->dirty = true;
	for (uint32_t i = 0; i < r->n_addresses; i++) {
		struct address *old = &r->addresses[i];

		if (old->ifindex != fresh.ifindex || old->local_be != local_be ||
		    old->prefix != fresh.prefix || old->length_bits != fresh.length_bits)
			continue;
		if (gone) {
			memmove(old, old + 1, (--r->n_addresses - i) * sizeof *old);
			r->must_dump = true;
		}
		return;
	}
	if (gone)
		return;
	r->addresses = route_grown(r->addresses, r->n_addresses, sizeof *r->addresses);
	r->addresses[r->n_addresses++] = fresh;
}

static void path_add(struct entry *e, int ifindex, uint8_t flags, uint16_t weight,
		     const struct nlattr *gateway, const struct nlattr *via)
{
	if (flags & RTNH_F_DEAD || e->n_paths == HOPS_MAX)
		return;
	e->path[e->n_paths++] = (struct path){
		.ifindex = ifindex,
		.weight = weight,
		.gateway_be = u32_of(gateway),
		.foreign = via != NULL,
	};
}

static void paths_of(struct entry *e, const struct rtmsg *info, const struct attributes *a)
{
	const struct nlattr *many = a->at[RTA_MULTIPATH];

	if (!many) {
		path_add(e, (int)u32_of(a->at[RTA_OIF]), (uint8_t)info->rtm_flags, 1, a->at[RTA_GATEWAY],
			 a->at[RTA_VIA]);
		return;
	}
	const struct rtnexthop *hop = mnl_attr_get_payload(many);
	int left = mnl_attr_get_payload_len(many);

	while (left >= (int)sizeof *hop && hop->rtnh_len >= sizeof *hop && hop->rtnh_len <= left) {
		struct attributes inner = {.max = RTA_MAX};

		mnl_attr_parse_payload(hop + 1, hop->rtnh_len - sizeof *hop, attribute_note, &inner);
		path_add(e, hop->rtnh_ifindex, hop->rtnh_flags, (uint16_t)(hop->rtnh_hops + 1),
			 inner.at[RTA_GATEWAY], inner.at[RTA_VIA]);
		left -= (int)RTNH_ALIGN(hop->rtnh_len);
		hop = RTNH_NEXT(hop);
	}
}

static uint32_t metric_mtu(const struct nlattr *metrics)
{
	struct attributes inner = {.max = RTAX_MAX};

	if (!metrics)
		return 0;
	mnl_attr_parse_nested(metrics, attribute_note, &inner);
	return u32_of(inner.at[RTAX_MTU]);
}

static void on_route(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct rtmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, RTA_MAX);
	uint32_t table = a.at[RTA_TABLE] ? u32_of(a.at[RTA_TABLE]) : info->rtm_table;

	if (info->rtm_family != AF_INET || info->rtm_flags & RTM_F_CLONED || info->rtm_dst_len > 32)
		return;
	if (table != RT_TABLE_LOCAL && table != RT_TABLE_MAIN && table != RT_TABLE_DEFAULT)
		return;
	struct entry fresh = {
		.prefix = ntohl(u32_of(a.at[RTA_DST])) & route_mask(info->rtm_dst_len),
		.length_bits = info->rtm_dst_len,
		.rank = table == RT_TABLE_LOCAL ? 2 : table == RT_TABLE_MAIN,
		.type = info->rtm_type,
		.tos = info->rtm_tos,
		.priority = u32_of(a.at[RTA_PRIORITY]),
		.mtu_bytes = metric_mtu(a.at[RTA_METRICS]),
	};
	paths_of(&fresh, info, &a);

	struct entry **at = entry_find(r, &fresh), *old = *at;

	r->dirty = true;
	if (gone) {
		if (!old || old->duplicate) {
			r->must_dump = true;
			return;
		}
		*at = old->next;
		free(old);
		r->n_routes--;
		return;
	}
	if (old && r->dumping) { /* same key twice: the kernel uses the first */
		old->duplicate = true;
		return;
	}
	if (old && !(message->nlmsg_flags & NLM_F_REPLACE)) {
		r->must_dump = true; /* appended or prepended: the order counts, ask again */
		return;
	}
	if (old) {
		fresh.next = old->next;
		*old = fresh;
		return;
	}
	if (r->n_routes >= r->n_chains) {
		route_chains_grow(r);
		at = entry_find(r, &fresh);
	}
	struct entry *e = malloc(sizeof *e);

	if (!e)
		abort();
	*e = fresh;
	*at = e;
	r->n_routes++;
}

static void on_neighbour(struct route *r, const struct nlmsghdr *message, bool gone)
{
	const struct ndmsg *info = mnl_nlmsg_get_payload(message);
	struct attributes a = attributes_of(message, sizeof *info, NDA_MAX);
	uint8_t iface = route_iface_of(r, info->ndm_ifindex);

	if (info->ndm_family != AF_INET || info->ndm_flags & NTF_PROXY || iface == NO_IFACE || !a.at[NDA_DST])
		return;
	const struct nlattr *lladdr = a.at[NDA_LLADDR];
	const uint8_t *mac =
		lladdr && mnl_attr_get_payload_len(lladdr) == 6 ? mnl_attr_get_payload(lladdr) : NULL;

	route_neighbour_set(r, iface, u32_of(a.at[NDA_DST]), gone ? NUD_NONE : info->ndm_state,
			    gone ? NULL : mac);
}

int route_on_message(const struct nlmsghdr *message, void *data)
{
	switch (message->nlmsg_type) {
	case RTM_NEWLINK:
	case RTM_DELLINK:
		on_link(data, message, message->nlmsg_type == RTM_DELLINK);
		break;
	case RTM_NEWADDR:
	case RTM_DELADDR:
		on_address(data, message, message->nlmsg_type == RTM_DELADDR);
		break;
	case RTM_NEWROUTE:
	case RTM_DELROUTE:
		on_route(data, message, message->nlmsg_type == RTM_DELROUTE);
		break;
	case RTM_NEWNEIGH:
	case RTM_DELNEIGH:
		on_neighbour(data, message, message->nlmsg_type == RTM_DELNEIGH);
		break;
	}
	return MNL_CB_OK;
}
