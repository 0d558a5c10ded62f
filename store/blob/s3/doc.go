// Package s3 keeps the repository's objects in S3-compatible storage.
//
// It hides the AWS SDK: requests, credentials, retries with backoff, multipart
// uploads, and how a lost answer is told from a lost request. What it needs of
// a server: consistent listings in byte order, If-None-Match: * on PUT (on
// completing a multipart upload too, where objects are large), and user
// metadata. It may import store/blob and no other package of Tidemark; no other
// package imports the SDK.
//
// What is put is never overwritten or deleted by a Put, also not by one that
// failed: a key that may only create objects and read them is enough for
// backups. A multipart upload that was broken off is aborted if the key may do that;
// a lifecycle rule should remove what stays (AbortIncompleteMultipartUpload).
//
// There are no locks: a Store is no blob.Locker.
package s3
